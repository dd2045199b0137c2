/* Products by shifts and additions, for weights, scales and slopes that are sums of few signed powers of two.
 *
 * A weight is a word of packed digits: EM_DIGITS fields of EM_DIGIT_BITS bits, the lowest field first. Bit 0
 * of a field is the sign (1: subtract), the others are the left shift. The shift EM_DIGIT_NONE stands for no
 * digit; where every word holds all its digits it is a number that no field can hold.
 *
 * A single digit may lead further than the whole product, so terms are added modulo 2**32 or 2**64. At most
 * three digits; their loop is unrolled by hand. */
#ifndef EDGEMAT_SHIFT_ADD_H
#define EDGEMAT_SHIFT_ADD_H

#include "edgemat_kernels.h"

#define EM_DEFINE_SHIFT_ADD(BITS)                                                                        \
    /* The term of the field that begins at bit `at`. The sign is spread over a mask: ~t + 1 = -t. */    \
    EM_INLINE uint##BITS##_t em_digit_s##BITS(uint##BITS##_t x, uint32_t word, int at, int digit_bits,   \
                                              uint32_t none) {                                           \
        const uint32_t shift = (word >> (at + 1)) & (((uint32_t)1 << (digit_bits - 1)) - 1u);            \
        const uint##BITS##_t term = shift == none ? 0 : x << shift;                                      \
        const uint##BITS##_t flip = (uint##BITS##_t)(int##BITS##_t)((int32_t)(word << (31 - at)) >> 31); \
        return (term ^ flip) - flip;                                                                     \
    }                                                                                                    \
    EM_INLINE int##BITS##_t em_shift_add_s##BITS(int##BITS##_t x, uint32_t word, int digits, int bits,   \
                                                 uint32_t none) {                                        \
        uint##BITS##_t total = em_digit_s##BITS((uint##BITS##_t)x, word, 0, bits, none);                 \
        if (digits > 1) {                                                                                \
            total += em_digit_s##BITS((uint##BITS##_t)x, word, bits, bits, none);                        \
        }                                                                                                \
        if (digits > 2) {                                                                                \
            total += em_digit_s##BITS((uint##BITS##_t)x, word, bits + bits, bits, none);                 \
        }                                                                                                \
        return (int##BITS##_t)total;                                                                     \
    }

EM_DEFINE_SHIFT_ADD(32)
EM_DEFINE_SHIFT_ADD(64)

#endif /* EDGEMAT_SHIFT_ADD_H */
