// SPDX-License-Identifier: Apache-2.0
// The product of an input and a constant that is a sum of few signed powers of two: shifts and additions, no
// multiplier.
//
// The constant is stored as packed digits: C::digit_count fields of C::digit_bits bits, the lowest digit in
// the lowest field. Bit 0 of a field is the sign (1: subtract), the others are the left shift; the shift
// C::digit_none stands for no digit. C::digits(stored) gives that word; where few words occur, a short index
// is stored instead, and C::digits looks it up.
#ifndef EDGEMAT_SHIFT_ADD_HPP
#define EDGEMAT_SHIFT_ADD_HPP

#include "edgemat/types.hpp"

namespace edgemat {

// A single digit may lead further than the whole product, so terms are added modulo a power of two.
template <class Sum>
struct modular {
    typedef Sum type;  // ap_int<N> wraps at every step
};
template <>
struct modular<int> {
    typedef unsigned type;
};
template <>
struct modular<long long> {
    typedef unsigned long long type;
};

// \tparam C  config: sum_t, digit_count, digit_bits, digit_none, digits(stored)
// \param x  a code
// \param stored  the constant's word or its index; constant where the loop around is unrolled, and then the
//                shifts are wires
template <class C, class X>
inline typename C::sum_t shift_add(X x, int stored) {
#pragma HLS INLINE
    typedef typename modular<typename C::sum_t>::type plain_t;
    typedef typename select<(C::digit_none > 31), unsigned long long, plain_t>::type bits_t;
    const unsigned word = C::digits(stored);
    const bits_t value = bits_t(operand(x));
    bits_t total = 0;
    for (int d = 0; d < C::digit_count; d++) {
#pragma HLS UNROLL
        const unsigned field = (word >> (d * C::digit_bits)) & ((1u << C::digit_bits) - 1u);
        const unsigned shift = field >> 1;
        if (shift != unsigned(C::digit_none)) {
            const bits_t term = value << shift;
            if ((field & 1u) != 0) {
                total -= term;
            } else {
                total += term;
            }
        }
    }
    return typename C::sum_t(total);
}

}  // namespace edgemat

#endif  // EDGEMAT_SHIFT_ADD_HPP
