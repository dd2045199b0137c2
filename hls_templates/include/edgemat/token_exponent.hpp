// SPDX-License-Identifier: Apache-2.0
// TokenExponent: for each row the smallest e >= 0 with every |code| below 2**(e + width - 1).
//
// C: rows, features, width; x0_size, y_size.
#ifndef EDGEMAT_TOKEN_EXPONENT_HPP
#define EDGEMAT_TOKEN_EXPONENT_HPP

#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void token_exponent(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    const int bits = code_traits<typename C::x0_t>::width + 1;
    typedef typename carrier<bits>::type code_t;
    for (int row = 0; row < C::rows; row++) {
        code_t largest = 0;
        for (int i = 0; i < C::features; i++) {
#pragma HLS PIPELINE II = 1
            const code_t code = operand(x[row * C::features + i]);
            const code_t size = code < 0 ? code_t(-code) : code;
            if (size > largest) largest = size;
        }
        int exponent = 0;
        for (int e = 0; e + C::width < bits; e++) {
#pragma HLS UNROLL
            if ((largest >> (e + C::width - 1)) != 0) exponent = e + 1;
        }
        y[row] = typename C::y_t(exponent);
    }
}

// Holds one sample, then runs the array form.
template <class C>
void token_exponent_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                           hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    token_exponent<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_TOKEN_EXPONENT_HPP
