// SPDX-License-Identifier: Apache-2.0
// Conv, one- and two-dimensional (one-dimensional: in_h = kernel_h = 1), with stride, padding, dilation and
// groups.
//
// C: in_h, in_w, in_c, out_h, out_w, out_c, kernel_*, stride_*, pad_top, pad_left, dilation_*, groups,
//    pe (divides out_c), simd (divides kernel_h * kernel_w * in_c / groups). Maps are channels last.
#ifndef EDGEMAT_CONV_HPP
#define EDGEMAT_CONV_HPP

#include "edgemat/conv_loop.hpp"
#include "edgemat/dot.hpp"

namespace edgemat {

template <class C>
void conv(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
          typename C::y_t y[C::out_h * C::out_w * C::out_c],
          const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
          const typename C::bias_t bias[C::out_c]) {
    conv_pixels<C, dense_dot>(x, y, weight, bias);
}

template <class C>
void conv_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
                 const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
                 const typename C::bias_t bias[C::out_c]) {
    conv_pixels_stream<C, dense_dot>(x, y, weight, bias);
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_HPP
