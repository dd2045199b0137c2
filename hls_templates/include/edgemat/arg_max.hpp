// SPDX-License-Identifier: Apache-2.0
// ArgMax: the index of the largest code along one axis.
//
// C: outer, axis_size, inner, last (1: of equal maxima the last, else the first); x0_size, y_size.
#ifndef EDGEMAT_ARG_MAX_HPP
#define EDGEMAT_ARG_MAX_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void arg_max(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    for (int o = 0; o < C::outer; o++) {
        for (int i = 0; i < C::inner; i++) {
            typename C::x0_t best = x[o * C::axis_size * C::inner + i];
            int found = 0;
            for (int a = 1; a < C::axis_size; a++) {
#pragma HLS PIPELINE II = 1
                const typename C::x0_t code = x[(o * C::axis_size + a) * C::inner + i];
                if (code > best || (C::last && code == best)) {
                    best = code;
                    found = a;
                }
            }
            y[o * C::inner + i] = finish<C>(typename C::acc_t(found), i % C::channels);
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void arg_max_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                    hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    arg_max<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_ARG_MAX_HPP
