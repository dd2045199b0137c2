// SPDX-License-Identifier: Apache-2.0
// The folded dot product that Linear, Conv and ConvTranspose share.
//
// y[o] = finish(bias[o] + sum_k weight[o][k] * taps[...]), with PE outputs and SIMD terms per clock cycle: a
// loop of (OUTPUTS / PE) * (DEPTH / SIMD) iterations at II = 1.
#ifndef EDGEMAT_DOT_HPP
#define EDGEMAT_DOT_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/shift_add.hpp"
#include "edgemat/signs.hpp"

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

// The product of a code and a stored constant. KIND: MULTIPLY or SHIFT_ADD.
template <class C, int KIND>
struct constant_product {
    template <class X, class W>
    static auto at(X x, W constant) -> decltype(multiply<typename C::sum_t>(x, constant)) {
#pragma HLS INLINE
        return multiply<typename C::sum_t>(x, constant);
    }
};
template <class C>
struct constant_product<C, SHIFT_ADD> {
    template <class X, class W>
    static typename C::sum_t at(X x, W stored) {
#pragma HLS INLINE
        return shift_add<C>(x, stored);
    }
};

// The terms of one iteration of the folded loop, added to `start`; one specialisation for each product_kind.
template <class C, int KIND>
struct term_sum {
    typename C::sum_t sum;
    explicit term_sum(typename C::sum_t start) : sum(start) {}
    template <class W>
    void take(int, typename C::x0_t x, W weight) {
#pragma HLS INLINE
        sum += constant_product<C, KIND>::at(x, weight);
    }
    typename C::sum_t total() const { return sum; }
};

template <class C>
struct term_sum<C, ADD_SIGNED> {
    typename C::sum_t sum;
    explicit term_sum(typename C::sum_t start) : sum(start) {}
    template <class W>
    void take(int, typename C::x0_t x, W negative) {
#pragma HLS INLINE
        if (negative != 0) {
            sum -= operand(x);
        } else {
            sum += operand(x);
        }
    }
    typename C::sum_t total() const { return sum; }
};

template <class C>
struct term_sum<C, COUNT_SIGNS> {
    typename C::sum_t sum;
    sign_counter<C::simd, C::padded> counter;
    explicit term_sum(typename C::sum_t start) : sum(start) {}
    template <class W>
    void take(int s, typename C::x0_t x, W negative) {
#pragma HLS INLINE
        counter.take(s, x, negative != 0);
    }
    typename C::sum_t total() const {
#pragma HLS INLINE
        return sum + counter.present() - 2 * counter.differing();
    }
};

// \tparam C  config: x0_t, weight_t, bias_t, acc_t, sum_t, y_t, product, pe, simd and the epilogue
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
                term_sum<C, C::product> sum(start == 0 ? typename C::sum_t(bias[o]) : partial[p]);
                for (int s = 0; s < C::simd; s++) {
#pragma HLS UNROLL
                    const int k = start + s;
                    const int tap =
                        GROUPS == 1 ? k : (k / group_channels) * CHANNELS + k % group_channels + offset;
                    sum.take(s, taps[tap], weight[o][k]);
                }
                partial[p] = sum.total();
                if (start == DEPTH - C::simd) y[o] = finish<C>(typename C::acc_t(partial[p]), o);
            }
        }
    }
}

// The dot product as the loops of Linear and Conv call it.
struct dense_dot {
    template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS, class Row>
    static void dot(const typename C::x0_t* taps, typename C::y_t* y, const Row* weight,
                    const typename C::bias_t* bias) {
#pragma HLS INLINE
        edgemat::dot<C, OUTPUTS, DEPTH, CHANNELS, GROUPS>(taps, weight, bias, y);
    }
};

}  // namespace edgemat

#endif  // EDGEMAT_DOT_HPP
