/* Products by shifts and additions, for weights, scales and slopes that are sums of few signed powers of two.
 *
 * A weight is a word of packed digits: EM_DIGITS fields of EM_DIGIT_BITS bits, the lowest field first. Bit 0 of
 * a field is the sign (1: subtract), the others are the left shift. The shift EM_DIGIT_NONE stands for no digit;
 * where every word holds all its digits it is a number that no field can hold.
 *
 * A single digit may lead further than the whole product, so terms are added modulo 2**32 or 2**64. */
#ifndef EDGEMAT_SHIFT_ADD_H
#define EDGEMAT_SHIFT_ADD_H

#include "edgemat_kernels.h"

#define EM_DEFINE_SHIFT_ADD(BITS)                                                                            \
    EM_INLINE int##BITS##_t em_shift_add_s##BITS(int##BITS##_t x, uint32_t word, int digits, int digit_bits, \
                                                 uint32_t none) {                                            \
        const uint32_t mask = ((uint32_t)1 << (digit_bits - 1)) - 1u;                                        \
        const uint##BITS##_t value = (uint##BITS##_t)x;                                                      \
        uint##BITS##_t total = 0;                                                                            \
        for (int d = 0; d < digits; ++d, word >>= digit_bits) {                                              \
            const uint32_t shift = (word >> 1) & mask;                                                       \
            const uint##BITS##_t term = shift == none ? 0 : value << shift;                                  \
            const uint##BITS##_t flip = (uint##BITS##_t)0 - (word & 1u);                                     \
            total += (term ^ flip) - flip;                                                                   \
        }                                                                                                    \
        return (int##BITS##_t)total;                                                                         \
    }

EM_DEFINE_SHIFT_ADD(32)
EM_DEFINE_SHIFT_ADD(64)

#endif /* EDGEMAT_SHIFT_ADD_H */
