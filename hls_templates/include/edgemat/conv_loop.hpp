// SPDX-License-Identifier: Apache-2.0
// The loops of Conv around its dot product.
//
// \tparam Dot  computes the outputs of one pixel: dense_dot (dot.hpp) or one of the ternary units
// (ternary.hpp)
// \tparam Weights  what its `dot` takes behind inputs and results
#ifndef EDGEMAT_CONV_LOOP_HPP
#define EDGEMAT_CONV_LOOP_HPP

#include "edgemat/window.hpp"

namespace edgemat {

template <class C, class Dot, class... Weights>
void conv_pixels(const typename C::x0_t* x, typename C::y_t* y, const Weights&... weights) {
#pragma HLS INLINE
    typedef window_shape<C> S;
    typename C::x0_t taps[S::taps];
    typename C::y_t pixel[C::out_c];
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
    for (int row = 0; row < C::out_h; row++) {
        for (int col = 0; col < C::out_w; col++) {
            gather_taps<C>(x, row, col, typename C::x0_t(0), taps);
            Dot::template dot<C, C::out_c, S::taps / C::groups, C::in_c, C::groups>(taps, pixel, weights...);
            for (int o = 0; o < C::out_c; o++) {
#pragma HLS UNROLL
                y[(row * C::out_w + col) * C::out_c + o] = pixel[o];
            }
        }
    }
}

template <class C, class Dot, class... Weights>
void conv_pixels_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                        hls::stream<vec<typename C::y_t, C::y_lanes> >& y, const Weights&... weights) {
#pragma HLS INLINE
    typedef window_shape<C> S;
    typename C::x0_t lines[S::line_count][C::in_w][C::in_c];
    typename C::x0_t window[S::extent_h][S::extent_w][C::in_c];
    typename C::x0_t pixel[C::in_c];
    typename C::x0_t taps[S::taps];
    typename C::y_t results[C::out_c];
#pragma HLS ARRAY_PARTITION variable = lines type = complete dim = 1
#pragma HLS ARRAY_RESHAPE variable = lines type = complete dim = 3
// A position reads and writes its own column only; the next position is another column.
#pragma HLS DEPENDENCE variable = lines type = inter false
#pragma HLS ARRAY_PARTITION variable = window type = complete dim = 0
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = results type = complete
    for (int row = 0; row < S::rows; row++) {
        for (int col = 0; col < S::cols; col++) {
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                pixel[c] = 0;
            }
            if (S::inside(row, col)) read_elements<C::in_c>(x, pixel);
            slide<C>(lines, window, pixel, typename C::x0_t(0), col);
            if (S::completes(row, col)) {
                select_taps<C>(window, taps);
                Dot::template dot<C, C::out_c, S::taps / C::groups, C::in_c, C::groups>(taps, results,
                                                                                        weights...);
                write_elements<C::out_c>(results, y);
            }
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_LOOP_HPP
