// SPDX-License-Identifier: Apache-2.0
// A recurrent state: a static array of the top function that stays from one call to the next.
//
// A call is one step. It reads the state, computes the next one in an array of its own, and copies that when
// the step is done; so nothing in the step sees a state half written.
#ifndef EDGEMAT_STATE_HPP
#define EDGEMAT_STATE_HPP

#include "edgemat/types.hpp"

namespace edgemat {

// Clear the state where a sequence begins, LANES elements a cycle.
template <int SIZE, int LANES, class T>
void begin_state(bool reset, T* state) {
#pragma HLS INLINE
    static_assert(SIZE % LANES == 0, "a state's lanes must divide its elements");
    if (!reset) return;
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            state[first + lane] = T(0);
        }
    }
}

// Take over what the step computed, LANES elements a cycle.
template <int SIZE, int LANES, class T>
void keep_state(const T* next, T* state) {
#pragma HLS INLINE
    static_assert(SIZE % LANES == 0, "a state's lanes must divide its elements");
    for (int first = 0; first < SIZE; first += LANES) {
#pragma HLS PIPELINE II = 1
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS UNROLL
            state[first + lane] = next[first + lane];
        }
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_STATE_HPP
