// SPDX-License-Identifier: Apache-2.0
// AXI4-Stream ports with TLAST: it marks the last beat of every sample. Lane 0 fills the lowest bits of a
// word.
#ifndef EDGEMAT_AXIS_HPP
#define EDGEMAT_AXIS_HPP

#include <ap_axi_sdata.h>
#include <hls_stream.h>

#include "edgemat/types.hpp"

namespace edgemat {

template <int BITS>
struct axis_word {
    typedef hls::axis<ap_uint<BITS>, 0, 0, 0> type;
};

template <int BITS, class T, int LANES>
vec<T, LANES> beat_of(const ap_uint<BITS>& word) {
#pragma HLS INLINE
    const int width = code_traits<T>::width;
    vec<T, LANES> beat;
    for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
        beat[lane] = T(ap_uint<width>(word >> (lane * width)));
    }
    return beat;
}

template <int BITS, class T, int LANES>
ap_uint<BITS> word_of(const vec<T, LANES>& beat) {
#pragma HLS INLINE
    const int width = code_traits<T>::width;
    ap_uint<BITS> word = 0;
    for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
        word |= ap_uint<BITS>(ap_uint<width>(beat[lane])) << (lane * width);
    }
    return word;
}

// Dataflow process: from words to beats. TLAST is not read: a sample has SIZE elements.
template <int SIZE, int BITS, class T, int LANES>
void unpack(hls::stream<hls::axis<ap_uint<BITS>, 0, 0, 0> >& source, hls::stream<vec<T, LANES> >& sink) {
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        const typename axis_word<BITS>::type word = source.read();
        sink.write(beat_of<BITS, T, LANES>(word.data));
    }
}

// Dataflow process: from beats to words.
template <int SIZE, int BITS, class T, int LANES>
void pack(hls::stream<vec<T, LANES> >& source, hls::stream<hls::axis<ap_uint<BITS>, 0, 0, 0> >& sink) {
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        typename axis_word<BITS>::type word;
        word.data = word_of<BITS, T, LANES>(source.read());
        word.keep = -1;
        word.strb = -1;
        word.last = first + LANES == SIZE;
        sink.write(word);
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_AXIS_HPP
