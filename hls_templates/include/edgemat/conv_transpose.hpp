// SPDX-License-Identifier: Apache-2.0
// ConvTranspose, written as a gather: every output pixel collects the input pixels whose kernel reaches it.
//
// C: as conv; pad_top and pad_left are those of ONNX, weight[out_c][kernel_h][kernel_w][in_c / groups].
#ifndef EDGEMAT_CONV_TRANSPOSE_HPP
#define EDGEMAT_CONV_TRANSPOSE_HPP

#include "edgemat/dot.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void conv_transpose(
    const typename C::x0_t x[C::in_h * C::in_w * C::in_c], typename C::y_t y[C::out_h * C::out_w * C::out_c],
    const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
    const typename C::bias_t bias[C::out_c]) {
    const int tap_count = C::kernel_h * C::kernel_w * C::in_c;
    typename C::x0_t taps[tap_count];
    typename C::y_t pixel[C::out_c];
#pragma HLS ARRAY_PARTITION variable = taps type = complete
#pragma HLS ARRAY_PARTITION variable = pixel type = complete
    for (int row = 0; row < C::out_h; row++) {
        for (int col = 0; col < C::out_w; col++) {
            for (int h = 0; h < C::kernel_h; h++) {
#pragma HLS UNROLL
                for (int w = 0; w < C::kernel_w; w++) {
#pragma HLS UNROLL
                    // The input pixel i adds to the output pixel i * stride + k * dilation - pad.
                    const int down = row + C::pad_top - h * C::dilation_h;
                    const int right = col + C::pad_left - w * C::dilation_w;
                    const int from_row = down / C::stride_h;
                    const int from_col = right / C::stride_w;
                    const bool reached = down >= 0 && right >= 0 && down % C::stride_h == 0 &&
                                         right % C::stride_w == 0 && from_row < C::in_h && from_col < C::in_w;
                    for (int c = 0; c < C::in_c; c++) {
#pragma HLS UNROLL
                        taps[(h * C::kernel_w + w) * C::in_c + c] =
                            reached ? x[(from_row * C::in_w + from_col) * C::in_c + c] : typename C::x0_t(0);
                    }
                }
            }
            dot<C, C::out_c, tap_count / C::groups, C::in_c, C::groups>(taps, weight, bias, pixel);
            for (int o = 0; o < C::out_c; o++) {
#pragma HLS UNROLL
                y[(row * C::out_w + col) * C::out_c + o] = pixel[o];
            }
        }
    }
}

// Holds one sample: the first output needs the whole input in the worst case.
template <class C>
void conv_transpose_stream(
    hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x, hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
    const typename C::weight_t weight[C::out_c][C::kernel_h * C::kernel_w * C::in_c / C::groups],
    const typename C::bias_t bias[C::out_c]) {
    typename C::x0_t map[C::in_h * C::in_w * C::in_c];
    typename C::y_t results[C::out_h * C::out_w * C::out_c];
    read_elements<C::in_h * C::in_w * C::in_c>(x, map);
    conv_transpose<C>(map, results, weight, bias);
    write_elements<C::out_h * C::out_w * C::out_c>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_TRANSPOSE_HPP
