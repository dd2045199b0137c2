// SPDX-License-Identifier: Apache-2.0
// The loops of the operators that work element by element.
//
// F::at(x, channel) gives the exact result (acc_t) of one element; the epilogue follows here. C: size,
// channels (length of the last axis, which the epilogue's shifts and per-channel constants follow), unroll
// (elements per cycle, divides size).
#ifndef EDGEMAT_ELEMENTWISE_HPP
#define EDGEMAT_ELEMENTWISE_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C, class F>
void map_array(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
#pragma HLS INLINE
    for (int first = 0; first < C::size; first += C::unroll) {
#pragma HLS PIPELINE II = 1
        for (int u = 0; u < C::unroll; u++) {
#pragma HLS UNROLL
            const int channel = (first + u) % C::channels;
            y[first + u] = finish<C>(F::at(x[first + u], channel), channel);
        }
    }
}

template <class C, class F>
void map_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
    static_assert(C::x0_lanes == C::y_lanes, "an element-wise operator keeps the lanes of its stream");
    for (int first = 0; first < C::size; first += C::x0_lanes) {
#pragma HLS PIPELINE II = 1
        const vec<typename C::x0_t, C::x0_lanes> in = x.read();
        vec<typename C::y_t, C::y_lanes> out;
        for (int lane = 0; lane < C::x0_lanes; lane++) {
#pragma HLS UNROLL
            const int channel = (first + lane) % C::channels;
            out[lane] = finish<C>(F::at(in[lane], channel), channel);
        }
        y.write(out);
    }
}

// Where operand K of a two-operand operator keeps the element that meets output element `index`. C:
// broadcast, dims(axis), stride0(axis), stride1(axis) over four axes, outermost first.
template <class C, int K>
int operand_index(int index) {
#pragma HLS INLINE
    if (!C::broadcast) return index;
    int rest = index;
    int found = 0;
    for (int axis = 3; axis >= 0; axis--) {
#pragma HLS UNROLL
        found += (rest % C::dims(axis)) * (K == 0 ? C::stride0(axis) : C::stride1(axis));
        rest /= C::dims(axis);
    }
    return found;
}

// x0 and x1 are arrays of any element type: a tensor or a constant operand.
template <class C, class F, class X0, class X1>
void map_arrays(const X0* x0, const X1* x1, typename C::y_t y[C::size]) {
#pragma HLS INLINE
    for (int first = 0; first < C::size; first += C::unroll) {
#pragma HLS PIPELINE II = 1
        for (int u = 0; u < C::unroll; u++) {
#pragma HLS UNROLL
            const int i = first + u;
            y[i] = finish<C>(F::at(x0[operand_index<C, 0>(i)], x1[operand_index<C, 1>(i)]), i % C::channels);
        }
    }
}

// Both operands have the shape of the result and arrive beat by beat.
template <class C, class F>
void map_streams(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                 hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
    static_assert(C::x0_lanes == C::y_lanes && C::x1_lanes == C::y_lanes,
                  "a join needs equal lanes on all sides");
    for (int first = 0; first < C::size; first += C::y_lanes) {
#pragma HLS PIPELINE II = 1
        const vec<typename C::x0_t, C::x0_lanes> a = x0.read();
        const vec<typename C::x1_t, C::x1_lanes> b = x1.read();
        vec<typename C::y_t, C::y_lanes> out;
        for (int lane = 0; lane < C::y_lanes; lane++) {
#pragma HLS UNROLL
            out[lane] = finish<C>(F::at(a[lane], b[lane]), (first + lane) % C::channels);
        }
        y.write(out);
    }
}

// Operand K is a stream with the shape of the result, the other one a constant array of any broadcast shape.
template <class C, class F, int K, class T, int LANES, class X>
void map_constant(hls::stream<vec<T, LANES> >& x, const X* constant,
                  hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
#pragma HLS INLINE
    static_assert(LANES == C::y_lanes, "an element-wise operator keeps the lanes of its stream");
    for (int first = 0; first < C::size; first += LANES) {
#pragma HLS PIPELINE II = 1
        const vec<T, LANES> in = x.read();
        vec<typename C::y_t, C::y_lanes> out;
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            const int i = first + lane;
            const X other = constant[operand_index<C, 1 - K>(i)];
            out[lane] = finish<C>(K == 0 ? F::at(in[lane], other) : F::at(other, in[lane]), i % C::channels);
        }
        y.write(out);
    }
}

// Two streams of different shapes: both samples are held, then the array form runs.
template <class C, class F>
void map_held(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
              hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
              hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t a[C::x0_size];
    typename C::x1_t b[C::x1_size];
    typename C::y_t results[C::size];
    read_elements<C::x0_size>(x0, a);
    read_elements<C::x1_size>(x1, b);
    map_arrays<C, F>(a, b, results);
    write_elements<C::size>(results, y);
}

// A code shifted left by BITS, exactly.
template <class C, int BITS, class T>
inline typename C::sum_t shifted(T code) {
#pragma HLS INLINE
    return left_shifted(typename C::sum_t(operand(code)), BITS);
}

}  // namespace edgemat

#endif  // EDGEMAT_ELEMENTWISE_HPP
