// SPDX-License-Identifier: Apache-2.0
// The loops of Linear around its dot product.
//
// \tparam Dot  computes the outputs of one row: dense_dot (dot.hpp) or one of the ternary units (ternary.hpp)
// \tparam Weights  what its `dot` takes behind inputs and results
#ifndef EDGEMAT_LINEAR_LOOP_HPP
#define EDGEMAT_LINEAR_LOOP_HPP

#include "edgemat/stream.hpp"

namespace edgemat {

template <class C, class Dot, class... Weights>
void linear_rows(const typename C::x0_t* x, typename C::y_t* y, const Weights&... weights) {
#pragma HLS INLINE
    typename C::x0_t taps[C::in_features];
    typename C::y_t results[C::out_features];
#pragma HLS ARRAY_PARTITION variable = taps type = cyclic factor = C::simd
#pragma HLS ARRAY_PARTITION variable = results type = cyclic factor = C::pe
    for (int row = 0; row < C::rows; row++) {
        for (int i = 0; i < C::in_features; i++) {
#pragma HLS UNROLL factor = C::simd
            taps[i] = x[row * C::in_features + i];
        }
        Dot::template dot<C, C::out_features, C::in_features, C::in_features, 1>(taps, results, weights...);
        for (int o = 0; o < C::out_features; o++) {
#pragma HLS UNROLL factor = C::pe
            y[row * C::out_features + o] = results[o];
        }
    }
}

template <class C, class Dot, class... Weights>
void linear_rows_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                        hls::stream<vec<typename C::y_t, C::y_lanes> >& y, const Weights&... weights) {
#pragma HLS INLINE
    typename C::x0_t taps[C::in_features];
    typename C::y_t results[C::out_features];
#pragma HLS ARRAY_PARTITION variable = taps type = cyclic factor = C::simd
#pragma HLS ARRAY_PARTITION variable = results type = cyclic factor = C::pe
    for (int row = 0; row < C::rows; row++) {
        read_elements<C::in_features>(x, taps);
        Dot::template dot<C, C::out_features, C::in_features, C::in_features, 1>(taps, results, weights...);
        write_elements<C::out_features>(results, y);
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_LINEAR_LOOP_HPP
