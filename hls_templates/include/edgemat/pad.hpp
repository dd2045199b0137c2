// SPDX-License-Identifier: Apache-2.0
// Pad: a constant code around a tensor.
//
// C: in_dims(axis), before(axis), after(axis), four axes, outermost first; value; x0_size, y_size.
#ifndef EDGEMAT_PAD_HPP
#define EDGEMAT_PAD_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void pad(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    int i = 0;
    for (int a = -C::before(0); a < C::in_dims(0) + C::after(0); a++) {
        for (int b = -C::before(1); b < C::in_dims(1) + C::after(1); b++) {
            for (int c = -C::before(2); c < C::in_dims(2) + C::after(2); c++) {
                for (int d = -C::before(3); d < C::in_dims(3) + C::after(3); d++) {
#pragma HLS PIPELINE II = 1
                    const bool inside = a >= 0 && a < C::in_dims(0) && b >= 0 && b < C::in_dims(1) &&
                                        c >= 0 && c < C::in_dims(2) && d >= 0 && d < C::in_dims(3);
                    const int from = ((a * C::in_dims(1) + b) * C::in_dims(2) + c) * C::in_dims(3) + d;
                    const long long value = C::value;
                    const typename C::acc_t code =
                        inside ? typename C::acc_t(x[from]) : typename C::acc_t(value);
                    y[i] = finish<C>(code, i % C::channels);
                    i++;
                }
            }
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void pad_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    pad<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_PAD_HPP
