// SPDX-License-Identifier: Apache-2.0
// TokenRescale: x0 * 2**x1 with one exponent x1 for each row, exact, then the requantisation.
//
// C: rows, features; x0_size, x1_size, y_size.
#ifndef EDGEMAT_TOKEN_RESCALE_HPP
#define EDGEMAT_TOKEN_RESCALE_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void token_rescale(const typename C::x0_t x0[C::x0_size], const typename C::x1_t x1[C::x1_size],
                   typename C::y_t y[C::y_size]) {
    typedef typename carrier<code_traits<typename C::acc_t>::width + 1>::type wide_t;
    for (int row = 0; row < C::rows; row++) {
        const unsigned exponent = unsigned(x1[row]);
        for (int i = 0; i < C::features; i++) {
#pragma HLS PIPELINE II = 1
            const int at = row * C::features + i;
            const wide_t code = operand(x0[at]);
            y[at] = finish<C>(typename C::acc_t(left_shifted(code, exponent)), i % C::channels);
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void token_rescale_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                          hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                          hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::x1_t exponents[C::x1_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x0, sample);
    read_elements<C::x1_size>(x1, exponents);
    token_rescale<C>(sample, exponents, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_TOKEN_RESCALE_HPP
