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

// The outputs of one pixel.
template <class C, class Dot>
struct conv_pixel {
    template <class... Weights>
    static void run(const typename C::x0_t* taps, typename C::y_t* results, int, int,
                    const Weights&... weights) {
#pragma HLS INLINE
        Dot::template dot<C, C::out_c, window_shape<C>::taps / C::groups, C::in_c, C::groups>(taps, results,
                                                                                              weights...);
    }
};

template <class C, class Dot, class... Weights>
void conv_pixels(const typename C::x0_t* x, typename C::y_t* y, const Weights&... weights) {
#pragma HLS INLINE
    typename C::x0_t taps[window_shape<C>::taps];
    typename C::y_t pixel[C::out_c];
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
    for (int row = 0; row < C::out_h; row++) {
        for (int col = 0; col < C::out_w; col++) {
            gather_taps<C>(x, row, col, typename C::x0_t(0), taps);
            conv_pixel<C, Dot>::run(taps, pixel, row, col, weights...);
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
    each_window<C, conv_pixel<C, Dot>, C::out_c>(x, y, typename C::x0_t(0), weights...);
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_LOOP_HPP
