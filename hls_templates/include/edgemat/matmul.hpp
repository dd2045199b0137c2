// SPDX-License-Identifier: Apache-2.0
// MatMul of two variable operands: y[b][i][j] = finish(sum_l x0[b][i][l] * x1[b][l][j]).
//
// C: batch, m, k, n, simd (divides k); x0_size, x1_size, y_size.
#ifndef EDGEMAT_MATMUL_HPP
#define EDGEMAT_MATMUL_HPP

#include "edgemat/dot.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C, class X0, class X1>
void matmul(const X0* x0, const X1* x1, typename C::y_t y[C::y_size]) {
    for (int b = 0; b < C::batch; b++) {
        for (int i = 0; i < C::m; i++) {
            for (int j = 0; j < C::n; j++) {
                typename C::sum_t sum = 0;
                for (int start = 0; start < C::k; start += C::simd) {
#pragma HLS PIPELINE II = 1
                    for (int s = 0; s < C::simd; s++) {
#pragma HLS UNROLL
                        const int l = start + s;
                        sum += multiply<typename C::sum_t>(x0[(b * C::m + i) * C::k + l],
                                                           x1[(b * C::k + l) * C::n + j]);
                    }
                }
                y[(b * C::m + i) * C::n + j] = finish<C>(typename C::acc_t(sum), j % C::channels);
            }
        }
    }
}

// Holds both operands of one sample.
template <class C>
void matmul_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                   hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                   hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t a[C::x0_size];
    typename C::x1_t b[C::x1_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x0, a);
    read_elements<C::x1_size>(x1, b);
    matmul<C>(a, b, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_MATMUL_HPP
