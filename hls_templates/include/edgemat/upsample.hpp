// SPDX-License-Identifier: Apache-2.0
// Upsample: every pixel repeated scale_h x scale_w times.
//
// C: in_h, in_w, in_c, scale_h, scale_w; x0_size, y_size.
#ifndef EDGEMAT_UPSAMPLE_HPP
#define EDGEMAT_UPSAMPLE_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void upsample(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    for (int row = 0; row < C::in_h * C::scale_h; row++) {
        for (int col = 0; col < C::in_w * C::scale_w; col++) {
#pragma HLS PIPELINE II = 1
            const int from = ((row / C::scale_h) * C::in_w + col / C::scale_w) * C::in_c;
            const int to = (row * C::in_w * C::scale_w + col) * C::in_c;
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                y[to + c] = finish<C>(typename C::acc_t(x[from + c]), c);
            }
        }
    }
}

// Keeps one row of the map, which it repeats.
template <class C>
void upsample_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                     hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    static_assert(C::x0_lanes == C::y_lanes, "an upsampling keeps the lanes of its stream");
    vec<typename C::x0_t, C::x0_lanes> line[C::in_w * C::in_c / C::x0_lanes];
    for (int row = 0; row < C::in_h * C::scale_h; row++) {
        for (int col = 0; col < C::in_w * C::scale_w; col++) {
            for (int b = 0; b < C::in_c / C::x0_lanes; b++) {
#pragma HLS PIPELINE II = 1
                const int at = (col / C::scale_w) * (C::in_c / C::x0_lanes) + b;
                if (row % C::scale_h == 0 && col % C::scale_w == 0) line[at] = x.read();
                vec<typename C::y_t, C::y_lanes> out;
                for (int lane = 0; lane < C::x0_lanes; lane++) {
#pragma HLS UNROLL
                    out[lane] = finish<C>(typename C::acc_t(line[at][lane]), b * C::x0_lanes + lane);
                }
                y.write(out);
            }
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_UPSAMPLE_HPP
