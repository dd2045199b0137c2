// SPDX-License-Identifier: Apache-2.0
// The loops of the pooling operators.
//
// F: state_t, start(), step(state, x), end(state, out_row, out_col, channel), fill() (what padding holds).
#ifndef EDGEMAT_POOL_HPP
#define EDGEMAT_POOL_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/window.hpp"

namespace edgemat {

// The results of one window, channel by channel.
template <class C, class F>
struct pool_window {
    static void run(const typename C::x0_t* taps, typename C::y_t* results, int out_row, int out_col) {
#pragma HLS INLINE
        for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
            typename F::state_t state = F::start();
            for (int k = 0; k < C::kernel_h * C::kernel_w; k++) {
#pragma HLS UNROLL
                state = F::step(state, taps[k * C::in_c + c]);
            }
            results[c] = F::end(state, out_row, out_col, c);
        }
    }
};

template <class C, class F>
void pool_array(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
                typename C::y_t y[C::out_h * C::out_w * C::in_c]) {
#pragma HLS INLINE
    typename C::x0_t taps[window_shape<C>::taps];
    typename C::y_t results[C::in_c];
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = results type = complete
    for (int row = 0; row < C::out_h; row++) {
        for (int col = 0; col < C::out_w; col++) {
#pragma HLS PIPELINE II = 1
            gather_taps<C>(x, row, col, F::fill(), taps);
            pool_window<C, F>::run(taps, results, row, col);
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                y[(row * C::out_w + col) * C::in_c + c] = results[c];
            }
        }
    }
}

template <class C, class F, bool WHOLE_MAP>
struct streaming_pool {
    static void run(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                    hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
        each_window<C, pool_window<C, F>, C::in_c>(x, y, F::fill());
    }
};

// One window covers the whole map: a running fold per channel, no window to keep.
template <class C, class F>
struct streaming_pool<C, F, true> {
    static void run(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                    hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
        typename C::x0_t pixel[C::in_c];
        typename C::y_t results[C::in_c];
        typename F::state_t state[C::in_c];
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
#pragma HLS ARRAY_PARTITION variable = state type = complete
#pragma HLS ARRAY_PARTITION variable = results type = complete
        for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
            state[c] = F::start();
        }
        for (int i = 0; i < C::in_h * C::in_w; i++) {
            read_elements<C::in_c>(x, pixel);
            for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                state[c] = F::step(state[c], pixel[c]);
            }
        }
        for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
            results[c] = F::end(state[c], 0, 0, c);
        }
        write_elements<C::in_c>(results, y);
    }
};

template <class C, class F>
void pool_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
    const bool whole_map = C::out_h * C::out_w == 1 && C::dilation_h == 1 && C::dilation_w == 1 &&
                           C::kernel_h >= C::pad_top + C::in_h && C::kernel_w >= C::pad_left + C::in_w;
    streaming_pool<C, F, whole_map>::run(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_POOL_HPP
