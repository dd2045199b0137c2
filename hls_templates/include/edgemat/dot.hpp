// SPDX-License-Identifier: Apache-2.0
// The folded dot product that Linear, Conv and ConvTranspose share.
//
// y[o] = finish(bias[o] + sum_k weight[o][k] * taps[...]), with PE outputs and SIMD terms per clock cycle: a
// loop of (OUTPUTS / PE) * (DEPTH / SIMD) iterations at II = 1.
#ifndef EDGEMAT_DOT_HPP
#define EDGEMAT_DOT_HPP

#include "edgemat/rounding.hpp"

namespace edgemat {

#ifdef EDGEMAT_HARDWARE_TYPES
template <class Sum, class A, class B>
inline auto multiply(A a, B b) -> decltype(a * b) {
#pragma HLS INLINE
    return a * b;
}
#else
template <class Sum, class A, class B>
inline Sum multiply(A a, B b) {
    return Sum(operand(a)) * Sum(operand(b));
}
#endif

// \tparam C  config: x0_t, weight_t, bias_t, acc_t, sum_t, y_t, pe, simd and the epilogue
// \tparam OUTPUTS, DEPTH  rows and columns of the weights
// \tparam CHANNELS, GROUPS  taps hold DEPTH / (CHANNELS / GROUPS) positions of CHANNELS codes; output o reads
// the
//         CHANNELS / GROUPS codes of its group at every position
template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS>
void dot(const typename C::x0_t taps[DEPTH * GROUPS], const typename C::weight_t weight[OUTPUTS][DEPTH],
         const typename C::bias_t bias[OUTPUTS], typename C::y_t y[OUTPUTS]) {
#pragma HLS INLINE
#pragma HLS ARRAY_RESHAPE variable = weight type = cyclic factor = C::pe dim = 1
#pragma HLS ARRAY_RESHAPE variable = weight type = cyclic factor = C::simd dim = 2
    const int group_channels = CHANNELS / GROUPS;
    const int group_outputs = OUTPUTS / GROUPS;
    typename C::sum_t partial[C::pe];
#pragma HLS ARRAY_PARTITION variable = partial type = complete
    for (int first = 0; first < OUTPUTS; first += C::pe) {
        for (int start = 0; start < DEPTH; start += C::simd) {
#pragma HLS PIPELINE II = 1
            for (int p = 0; p < C::pe; p++) {
#pragma HLS UNROLL
                const int o = first + p;
                const int offset = GROUPS == 1 ? 0 : (o / group_outputs) * group_channels;
                typename C::sum_t sum = start == 0 ? typename C::sum_t(bias[o]) : partial[p];
                for (int s = 0; s < C::simd; s++) {
#pragma HLS UNROLL
                    const int k = start + s;
                    const int tap =
                        GROUPS == 1 ? k : (k / group_channels) * CHANNELS + k % group_channels + offset;
                    sum += multiply<typename C::sum_t>(taps[tap], weight[o][k]);
                }
                partial[p] = sum;
                if (start == DEPTH - C::simd) y[o] = finish<C>(typename C::acc_t(sum), o);
            }
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_DOT_HPP
