// SPDX-License-Identifier: Apache-2.0
// Linear: y[r][o] = finish(bias[o] + sum_i weight[o][i] * x[r][i]).
//
// C: rows, in_features, out_features, pe (divides out_features), simd (divides in_features).
#ifndef EDGEMAT_LINEAR_HPP
#define EDGEMAT_LINEAR_HPP

#include "edgemat/dot.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void linear(const typename C::x0_t x[C::rows * C::in_features], typename C::y_t y[C::rows * C::out_features],
            const typename C::weight_t weight[C::out_features][C::in_features],
            const typename C::bias_t bias[C::out_features]) {
    typename C::x0_t taps[C::in_features];
    typename C::y_t results[C::out_features];
#pragma HLS ARRAY_PARTITION variable = taps type = cyclic factor = C::simd
#pragma HLS ARRAY_PARTITION variable = results type = cyclic factor = C::pe
    for (int row = 0; row < C::rows; row++) {
        for (int i = 0; i < C::in_features; i++) {
#pragma HLS UNROLL factor = C::simd
            taps[i] = x[row * C::in_features + i];
        }
        dot<C, C::out_features, C::in_features, C::in_features, 1>(taps, weight, bias, results);
        for (int o = 0; o < C::out_features; o++) {
#pragma HLS UNROLL factor = C::pe
            y[row * C::out_features + o] = results[o];
        }
    }
}

template <class C>
void linear_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                   hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
                   const typename C::weight_t weight[C::out_features][C::in_features],
                   const typename C::bias_t bias[C::out_features]) {
    typename C::x0_t taps[C::in_features];
    typename C::y_t results[C::out_features];
#pragma HLS ARRAY_PARTITION variable = taps type = cyclic factor = C::simd
#pragma HLS ARRAY_PARTITION variable = results type = cyclic factor = C::pe
    for (int row = 0; row < C::rows; row++) {
        read_elements<C::in_features>(x, taps);
        dot<C, C::out_features, C::in_features, C::in_features, 1>(taps, weight, bias, results);
        write_elements<C::out_features>(results, y);
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_LINEAR_HPP
