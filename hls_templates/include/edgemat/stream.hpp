// SPDX-License-Identifier: Apache-2.0
// Moving samples between arrays and streams, and splitting a stream among several readers.
#ifndef EDGEMAT_STREAM_HPP
#define EDGEMAT_STREAM_HPP

#include <hls_stream.h>

#include "edgemat/types.hpp"

namespace edgemat {

// Read COUNT elements, LANES a beat, into an array.
template <int COUNT, class T, int LANES>
void read_elements(hls::stream<vec<T, LANES> >& source, T* elements) {
#pragma HLS INLINE
    static_assert(COUNT % LANES == 0, "a stream's lanes must divide the elements read at a time");
    for (int first = 0; first < COUNT; first += LANES) {
#pragma HLS PIPELINE II = 1
        const vec<T, LANES> beat = source.read();
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            elements[first + lane] = beat[lane];
        }
    }
}

// Write COUNT elements of an array, LANES a beat.
template <int COUNT, class T, int LANES>
void write_elements(const T* elements, hls::stream<vec<T, LANES> >& sink) {
#pragma HLS INLINE
    static_assert(COUNT % LANES == 0, "a stream's lanes must divide the elements written at a time");
    for (int first = 0; first < COUNT; first += LANES) {
#pragma HLS PIPELINE II = 1
        vec<T, LANES> beat;
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            beat[lane] = elements[first + lane];
        }
        sink.write(beat);
    }
}

// Dataflow process: feed a stream from a memory port or from constants of any element type.
template <int SIZE, class X, class T, int LANES>
void load(const X* elements, hls::stream<vec<T, LANES> >& sink) {
    static_assert(SIZE % LANES == 0, "a stream's lanes must divide the elements written to it");
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        vec<T, LANES> beat;
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            beat[lane] = T(elements[first + lane]);
        }
        sink.write(beat);
    }
}

// Dataflow process: store a stream to a memory port.
template <int SIZE, class T, int LANES>
void store(hls::stream<vec<T, LANES> >& source, T elements[SIZE]) {
    read_elements<SIZE>(source, elements);
}

// Dataflow process: give a tensor to several readers; each beat goes to every reader before the next is
// taken.
template <int SIZE, class T, int LANES, class... Sinks>
void clone(hls::stream<vec<T, LANES> >& source, Sinks&... sinks) {
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        const vec<T, LANES> beat = source.read();
        const int written[] = {(static_cast<void>(sinks.write(beat)), 0)...};
        (void)written;
    }
}

// Dataflow process: take a tensor that nothing reads.
template <int SIZE, class T, int LANES>
void drain(hls::stream<vec<T, LANES> >& source) {
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        source.read();
    }
}

// The clone of arrays between the processes of a dataflow region.
template <int SIZE, class T, class... Sinks>
void clone_array(const T* source, Sinks*... sinks) {
    for (int i = 0; i < SIZE; i++) {
#pragma HLS PIPELINE II = 1
        const T code = source[i];
        // the cast keeps ap_int's own comma, which concatenates bits, out of it
        const int written[] = {(static_cast<void>(sinks[i] = code), 0)...};
        (void)written;
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_STREAM_HPP
