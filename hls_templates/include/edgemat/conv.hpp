// SPDX-License-Identifier: Apache-2.0
// Conv, one- and two-dimensional (one-dimensional: in_h = kernel_h = 1), with stride, padding, dilation and
// groups.
//
// C: in_h, in_w, in_c, out_h, out_w, out_c, kernel_*, stride_*, pad_top, pad_left, dilation_*, groups,
//    pe (divides out_c), simd (divides kernel_h * kernel_w * in_c / groups). Maps are channels last.
#ifndef EDGEMAT_CONV_HPP
#define EDGEMAT_CONV_HPP

#include "edgemat/dot.hpp"
#include "edgemat/window.hpp"

namespace edgemat {

template <class C>
void conv(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
          typename C::y_t y[C::out_h * C::out_w * C::out_c],
          const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
          const typename C::bias_t bias[C::out_c]) {
    typedef window_shape<C> S;
    typename C::x0_t taps[S::taps];
    typename C::y_t pixel[C::out_c];
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
    for (int row = 0; row < C::out_h; row++) {
        for (int col = 0; col < C::out_w; col++) {
            gather_taps<C>(x, row, col, typename C::x0_t(0), taps);
            dot<C, C::out_c, S::taps / C::groups, C::in_c, C::groups>(taps, weight, bias, pixel);
            for (int o = 0; o < C::out_c; o++) {
#pragma HLS UNROLL
                y[(row * C::out_w + col) * C::out_c + o] = pixel[o];
            }
        }
    }
}

template <class C>
void conv_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
                 const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
                 const typename C::bias_t bias[C::out_c]) {
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
                dot<C, C::out_c, S::taps / C::groups, C::in_c, C::groups>(taps, weight, bias, results);
                write_elements<C::out_c>(results, y);
            }
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_HPP
