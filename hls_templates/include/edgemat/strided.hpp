// SPDX-License-Identifier: Apache-2.0
// A copy with strides: what Slice and Transpose are.
//
// C: dims(axis) of the output, stride(axis) in input elements, four axes, outermost first; offset; x0_size,
// y_size.
#ifndef EDGEMAT_STRIDED_HPP
#define EDGEMAT_STRIDED_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void strided(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    int i = 0;
    for (int a = 0; a < C::dims(0); a++) {
        for (int b = 0; b < C::dims(1); b++) {
            for (int c = 0; c < C::dims(2); c++) {
                for (int d = 0; d < C::dims(3); d++) {
#pragma HLS PIPELINE II = 1
                    const int from =
                        C::offset + a * C::stride(0) + b * C::stride(1) + c * C::stride(2) + d * C::stride(3);
                    y[i] = finish<C>(typename C::acc_t(x[from]), i % C::channels);
                    i++;
                }
            }
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void strided_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                    hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    strided<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_STRIDED_HPP
