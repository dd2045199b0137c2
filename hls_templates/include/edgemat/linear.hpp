// SPDX-License-Identifier: Apache-2.0
// Linear: y[r][o] = finish(bias[o] + sum_i weight[o][i] * x[r][i]).
//
// C: rows, in_features, out_features, pe (divides out_features), simd (divides in_features).
#ifndef EDGEMAT_LINEAR_HPP
#define EDGEMAT_LINEAR_HPP

#include "edgemat/dot.hpp"
#include "edgemat/linear_loop.hpp"

namespace edgemat {

template <class C>
void linear(const typename C::x0_t x[C::rows * C::in_features], typename C::y_t y[C::rows * C::out_features],
            const typename C::weight_t weight[C::out_features][C::in_features],
            const typename C::bias_t bias[C::out_features]) {
    linear_rows<C, dense_dot>(x, y, weight, bias);
}

template <class C>
void linear_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                   hls::stream<vec<typename C::y_t, C::y_lanes> >& y,
                   const typename C::weight_t weight[C::out_features][C::in_features],
                   const typename C::bias_t bias[C::out_features]) {
    linear_rows_stream<C, dense_dot>(x, y, weight, bias);
}

}  // namespace edgemat

#endif  // EDGEMAT_LINEAR_HPP
