// SPDX-License-Identifier: Apache-2.0
// The row-wise unit: y[i] = F::at(x0[i], x1[i], ...) over a row of N elements, LANES a clock cycle.
//
// F has a static at() of one element of each operand; row_sum and its neighbours below give exact codes, and
// `finished` puts the epilogue of a config struct behind any of them. Operands may have different types.
#ifndef EDGEMAT_ROW_OPERATION_HPP
#define EDGEMAT_ROW_OPERATION_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

// \tparam N  elements; not necessarily a multiple of LANES
template <class F, int N, int LANES, class Y, class... X>
void row_operation(Y* y, const X*... x) {
#pragma HLS INLINE
    for (int first = 0; first < N; first += LANES) {
#pragma HLS PIPELINE II = 1
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            if (first + lane < N) y[first + lane] = F::at(x[first + lane]...);
        }
    }
}

// The same on streams, a beat of LANES elements a cycle; LANES divides N.
template <class F, int N, class Y, int LANES, class... X>
void row_operation_stream(hls::stream<vec<Y, LANES> >& y, hls::stream<vec<X, LANES> >&... x) {
    static_assert(N % LANES == 0, "a stream's lanes must divide the row");
    struct lanes {
        static vec<Y, LANES> at(const vec<X, LANES>&... in) {
#pragma HLS INLINE
            vec<Y, LANES> out;
            for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
                out[lane] = F::at(in[lane]...);
            }
            return out;
        }
    };
    for (int first = 0; first < N; first += LANES) {
#pragma HLS PIPELINE II = 1
        y.write(lanes::at(x.read()...));
    }
}

struct row_sum {
    template <class A, class B>
    static auto at(const A& a, const B& b) -> decltype(a + b) {
        return a + b;
    }
};
struct row_difference {
    template <class A, class B>
    static auto at(const A& a, const B& b) -> decltype(a - b) {
        return a - b;
    }
};
struct row_maximum {
    template <class A>
    static A at(const A& a, const A& b) {
        return a < b ? b : a;
    }
};

// F's exact code through the epilogue of C (rounding.hpp); one binary point for the row.
template <class C, class F>
struct finished {
    template <class... X>
    static typename C::y_t at(const X&... x) {
#pragma HLS INLINE
        return finish<C>(typename C::acc_t(F::at(x...)), 0);
    }
};

}  // namespace edgemat

#endif  // EDGEMAT_ROW_OPERATION_HPP
