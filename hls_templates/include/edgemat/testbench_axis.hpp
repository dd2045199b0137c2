// SPDX-License-Identifier: Apache-2.0
// The test bench's side of AXI4-Stream ports with TLAST. Not for synthesis.
#ifndef EDGEMAT_TESTBENCH_AXIS_HPP
#define EDGEMAT_TESTBENCH_AXIS_HPP

#include "edgemat/axis.hpp"
#include "edgemat/testbench.hpp"

namespace edgemat {
namespace testbench {

template <int SIZE, class T, int LANES, int BITS>
void push(source& feed, hls::stream<hls::axis<ap_uint<BITS>, 0, 0, 0> >& port) {
    for (int first = 0; first < SIZE; first += LANES) {
        vec<T, LANES> beat;
        feed.copy(beat.data, LANES);
        typename axis_word<BITS>::type word;
        word.data = word_of<BITS, T, LANES>(beat);
        word.keep = -1;
        word.strb = -1;
        word.last = first + LANES == SIZE;
        port.write(word);
    }
}

template <int SIZE, class T, int LANES, int BITS>
void pop(hls::stream<hls::axis<ap_uint<BITS>, 0, 0, 0> >& port, std::vector<long long>& codes) {
    for (int first = 0; first < SIZE; first += LANES) {
        const typename axis_word<BITS>::type word = port.read();
        if ((word.last == 1) != (first + LANES == SIZE)) {
            std::fprintf(stderr, "edgemat: TLAST is %d at element %d of %d\n", word.last == 1, first, SIZE);
            std::exit(1);
        }
        append(beat_of<BITS, T, LANES>(word.data).data, LANES, codes);
    }
}

}  // namespace testbench
}  // namespace edgemat

#endif  // EDGEMAT_TESTBENCH_AXIS_HPP
