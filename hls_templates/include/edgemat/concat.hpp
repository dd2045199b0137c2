// SPDX-License-Identifier: Apache-2.0
// Concat: per outer step, inner(k) elements of every input in turn.
//
// C: outer, inner(k), total (sum of inner), y_size.
#ifndef EDGEMAT_CONCAT_HPP
#define EDGEMAT_CONCAT_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C, int K>
void concat_arrays(typename C::y_t*, int) {}
template <class C, int K, class X, class... Rest>
void concat_arrays(typename C::y_t* y, int offset, const X* x, const Rest*... rest) {
#pragma HLS INLINE
    for (int o = 0; o < C::outer; o++) {
        for (int i = 0; i < C::inner(K); i++) {
#pragma HLS PIPELINE II = 1
            const int to = o * C::total + offset + i;
            y[to] = finish<C>(typename C::acc_t(x[o * C::inner(K) + i]), to % C::channels);
        }
    }
    concat_arrays<C, K + 1>(y, offset + C::inner(K), rest...);
}
template <class C, class... X>
void concat(typename C::y_t y[C::y_size], const X*... x) {
    concat_arrays<C, 0>(y, 0, x...);
}

template <class C, int K>
void concat_step(typename C::acc_t*) {}
template <class C, int K, class T, int LANES, class... Rest>
void concat_step(typename C::acc_t* joined, hls::stream<vec<T, LANES> >& x, Rest&... rest) {
#pragma HLS INLINE
    T part[C::inner(K)];
#pragma HLS ARRAY_PARTITION variable = part type = complete
    read_elements<C::inner(K)>(x, part);
    for (int i = 0; i < C::inner(K); i++) {
#pragma HLS UNROLL
        joined[i] = typename C::acc_t(part[i]);
    }
    concat_step<C, K + 1>(joined + C::inner(K), rest...);
}
// Reads one outer step of every input, then writes it.
template <class C, class... X>
void concat_stream(hls::stream<vec<typename C::y_t, C::y_lanes> >& y, X&... x) {
    typename C::acc_t joined[C::total];
    typename C::y_t results[C::total];
    for (int o = 0; o < C::outer; o++) {
        concat_step<C, 0>(joined, x...);
        for (int i = 0; i < C::total; i++) {
#pragma HLS UNROLL factor = C::y_lanes
            results[i] = finish<C>(joined[i], (o * C::total + i) % C::channels);
        }
        write_elements<C::total>(results, y);
    }
}

template <class C, int K>
void concat_beats_step(hls::stream<vec<typename C::y_t, C::y_lanes> >&, int) {}
template <class C, int K, class T, class... Rest>
void concat_beats_step(hls::stream<vec<typename C::y_t, C::y_lanes> >& y, int index,
                       hls::stream<vec<T, C::y_lanes> >& x, Rest&... rest) {
#pragma HLS INLINE
    for (int first = 0; first < C::inner(K); first += C::y_lanes) {
#pragma HLS PIPELINE II = 1
        const vec<T, C::y_lanes> in = x.read();
        vec<typename C::y_t, C::y_lanes> out;
        for (int lane = 0; lane < C::y_lanes; lane++) {
#pragma HLS UNROLL
            out[lane] = finish<C>(typename C::acc_t(in[lane]), (index + first + lane) % C::channels);
        }
        y.write(out);
    }
    concat_beats_step<C, K + 1>(y, index + C::inner(K), rest...);
}
// All streams have the same lanes: beats pass through without being held.
template <class C, class... X>
void concat_beats_stream(hls::stream<vec<typename C::y_t, C::y_lanes> >& y, X&... x) {
    for (int o = 0; o < C::outer; o++) {
        concat_beats_step<C, 0>(y, o * C::total, x...);
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_CONCAT_HPP
