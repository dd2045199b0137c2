// SPDX-License-Identifier: Apache-2.0
// ConvTranspose, written as a gather: every output pixel collects the input pixels whose kernel reaches it.
//
// C: as conv; pad_top and pad_left are those of ONNX, weight[out_c][kernel_h][kernel_w][in_c / groups].
#ifndef EDGEMAT_CONV_TRANSPOSE_HPP
#define EDGEMAT_CONV_TRANSPOSE_HPP

#include "edgemat/conv_transpose_loop.hpp"
#include "edgemat/dot.hpp"

namespace edgemat {

template <class C>
void conv_transpose(
    const typename C::x0_t x[C::in_h * C::in_w * C::in_c], typename C::y_t y[C::out_h * C::out_w * C::out_c],
    const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
    const typename C::bias_t bias[C::out_c]) {
    conv_transpose_pixels<C, dense_dot>(x, y, weight, bias);
}

template <class C>
void conv_transpose_stream(
    hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x, hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
    const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
    const typename C::bias_t bias[C::out_c]) {
    conv_transpose_pixels_stream<C, dense_dot>(x, y, weight, bias);
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_TRANSPOSE_HPP
