// SPDX-License-Identifier: Apache-2.0
// RmsNorm: every row divided by its root mean square, times gain(i).
//
// C: rows, features, and what row_norm.hpp lists; x0_size, y_size.
#ifndef EDGEMAT_RMS_NORM_HPP
#define EDGEMAT_RMS_NORM_HPP

#include "edgemat/row_norm.hpp"

namespace edgemat {

template <class C>
void rms_norm(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    typedef typename carrier<C::total_bits + 2>::type total_t;
    for (int row = 0; row < C::rows; row++) {
        const int first = row * C::features;
        total_t total = 0;
        for (int i = 0; i < C::features; i++) {
#pragma HLS PIPELINE II = 1
            const typename carrier<code_traits<typename C::x0_t>::width + 1>::type code =
                operand(x[first + i]);
            total += total_t(code * code);
        }
        const scale found = row_scale<C>(total);
        for (int i = 0; i < C::features; i++) {
#pragma HLS PIPELINE II = 1
            y[first + i] = normalized<C>(operand(x[first + i]), found, i);
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void rms_norm_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                     hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    rms_norm<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_RMS_NORM_HPP
