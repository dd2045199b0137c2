// SPDX-License-Identifier: Apache-2.0
// The sliding window of the streaming Conv and pooling operators, and its gathering from an array.
//
// Positions run over the padded map, row by row. Padding is inserted, never read. A position is an output
// position when its row and column are the last ones of a window.
#ifndef EDGEMAT_WINDOW_HPP
#define EDGEMAT_WINDOW_HPP

#include "edgemat/stream.hpp"

namespace edgemat {

// Geometry of a window. C: in_h, in_w, in_c, out_h, out_w, kernel_*, stride_*, pad_top, pad_left, dilation_*.
template <class C>
struct window_shape {
    static const int extent_h = (C::kernel_h - 1) * C::dilation_h + 1;
    static const int extent_w = (C::kernel_w - 1) * C::dilation_w + 1;
    static const int needed_h = (C::out_h - 1) * C::stride_h + extent_h;
    static const int needed_w = (C::out_w - 1) * C::stride_w + extent_w;
    // Every input pixel is read, also those that no window reaches.
    static const int rows = needed_h > C::pad_top + C::in_h ? needed_h : C::pad_top + C::in_h;
    static const int cols = needed_w > C::pad_left + C::in_w ? needed_w : C::pad_left + C::in_w;
    static const int line_count = extent_h > 1 ? extent_h - 1 : 1;
    static const int taps = C::kernel_h * C::kernel_w * C::in_c;

    static bool inside(int row, int col) {
#pragma HLS INLINE
        return row >= C::pad_top && row < C::pad_top + C::in_h && col >= C::pad_left &&
               col < C::pad_left + C::in_w;
    }
    static bool completes(int row, int col) {
#pragma HLS INLINE
        const int top = row - (extent_h - 1);
        const int left = col - (extent_w - 1);
        return top >= 0 && left >= 0 && top % C::stride_h == 0 && left % C::stride_w == 0 && row < needed_h &&
               col < needed_w;
    }
};

// Shift one pixel into the window. `lines` keeps the last extent_h - 1 rows of the map, `window` the last
// extent_w columns of those rows and the current one.
template <class C>
void slide(typename C::x0_t lines[window_shape<C>::line_count][C::in_w][C::in_c],
           typename C::x0_t window[window_shape<C>::extent_h][window_shape<C>::extent_w][C::in_c],
           const typename C::x0_t pixel[C::in_c], typename C::x0_t fill, int col) {
#pragma HLS INLINE
    typedef window_shape<C> S;
    const int column = col - C::pad_left;
    const bool stored = column >= 0 && column < C::in_w;
    for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
        for (int r = 0; r < S::extent_h; r++) {
#pragma HLS UNROLL
            for (int w = 0; w < S::extent_w - 1; w++) {
#pragma HLS UNROLL
                window[r][w][c] = window[r][w + 1][c];
            }
        }
        for (int r = 0; r < S::extent_h - 1; r++) {
#pragma HLS UNROLL
            const typename C::x0_t code = stored ? lines[r][column][c] : fill;
            window[r][S::extent_w - 1][c] = code;
            if (r > 0 && stored) lines[r - 1][column][c] = code;
        }
        window[S::extent_h - 1][S::extent_w - 1][c] = pixel[c];
        if (S::extent_h > 1 && stored) lines[S::line_count - 1][column][c] = pixel[c];
    }
}

// The taps of a complete window, in the order [kernel_h][kernel_w][in_c].
template <class C>
void select_taps(const typename C::x0_t window[window_shape<C>::extent_h][window_shape<C>::extent_w][C::in_c],
                 typename C::x0_t taps[window_shape<C>::taps]) {
#pragma HLS INLINE
    for (int h = 0; h < C::kernel_h; h++) {
#pragma HLS UNROLL
        for (int w = 0; w < C::kernel_w; w++) {
#pragma HLS UNROLL
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                taps[(h * C::kernel_w + w) * C::in_c + c] = window[h * C::dilation_h][w * C::dilation_w][c];
            }
        }
    }
}

// The same from an array, for the output pixel (out_row, out_col).
template <class C>
void gather_taps(const typename C::x0_t x[C::in_h * C::in_w * C::in_c], int out_row, int out_col,
                 typename C::x0_t fill, typename C::x0_t taps[window_shape<C>::taps]) {
#pragma HLS INLINE
    for (int h = 0; h < C::kernel_h; h++) {
#pragma HLS UNROLL
        for (int w = 0; w < C::kernel_w; w++) {
#pragma HLS UNROLL
            const int row = out_row * C::stride_h + h * C::dilation_h - C::pad_top;
            const int col = out_col * C::stride_w + w * C::dilation_w - C::pad_left;
            const bool inside = row >= 0 && row < C::in_h && col >= 0 && col < C::in_w;
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                taps[(h * C::kernel_w + w) * C::in_c + c] =
                    inside ? x[(row * C::in_w + col) * C::in_c + c] : fill;
            }
        }
    }
}

// The results of every complete window of a stream, window by window.
// \tparam At  At::run(taps, results, out_row, out_col, arguments...) forms those of one window
// \tparam OUTPUTS  results of a window
// \param fill  what padding holds
template <class C, class At, int OUTPUTS, class... Arguments>
void each_window(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y, typename C::x0_t fill,
                 const Arguments&... arguments) {
#pragma HLS INLINE
    typedef window_shape<C> S;
    typename C::x0_t lines[S::line_count][C::in_w][C::in_c];
    typename C::x0_t window[S::extent_h][S::extent_w][C::in_c];
    typename C::x0_t pixel[C::in_c];
    typename C::x0_t taps[S::taps];
    typename C::y_t results[OUTPUTS];
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
                pixel[c] = fill;
            }
            if (S::inside(row, col)) read_elements<C::in_c>(x, pixel);
            slide<C>(lines, window, pixel, fill, col);
            if (S::completes(row, col)) {
                select_taps<C>(window, taps);
                At::run(taps, results, (row - S::extent_h + 1) / C::stride_h,
                        (col - S::extent_w + 1) / C::stride_w, arguments...);
                write_elements<OUTPUTS>(results, y);
            }
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_WINDOW_HPP
