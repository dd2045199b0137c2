// SPDX-License-Identifier: Apache-2.0
// Sums of products of signs without multipliers: elements - 2 * (places in which two rows of signs differ).
//
// An input code is -1, +1, or 0 where a window hangs over the map; its lowest bit says that it is present,
// the bit above that it is negative.
#ifndef EDGEMAT_SIGNS_HPP
#define EDGEMAT_SIGNS_HPP

#include "edgemat/types.hpp"

namespace edgemat {

// Bits that hold the numbers 0 .. N.
template <int N>
struct count_width {
    static const int value = 1 + count_width<(N >> 1)>::value;
};
template <>
struct count_width<0> {
    static const int value = 0;
};

// The number of ones among W bits: a tree of adders, each as wide as its count.
template <int W>
struct bit_count {
    typedef ap_uint<count_width<W>::value> type;
    static type of(ap_uint<W> bits) {
#pragma HLS INLINE
        const ap_uint<W / 2> low = bits.range(W / 2 - 1, 0);
        const ap_uint<W - W / 2> high = bits.range(W - 1, W / 2);
        return type(bit_count<W / 2>::of(low)) + type(bit_count<W - W / 2>::of(high));
    }
};
template <>
struct bit_count<1> {
    typedef ap_uint<1> type;
    static type of(ap_uint<1> bits) { return bits; }
};

// Collects SIMD pairs of signs. PADDED: inputs may be 0, which then count nowhere.
#ifdef EDGEMAT_HARDWARE_TYPES
template <int SIMD, bool PADDED>
struct sign_counter {
    ap_uint<SIMD> inside;
    ap_uint<SIMD> differs;
    sign_counter() : inside(0), differs(0) {}
    template <class X>
    void take(int s, X x, bool negative) {
#pragma HLS INLINE
        const bool here = !PADDED || bool(x[0]);
        inside[s] = here;
        differs[s] = here && bool(x[1]) != negative;
    }
    int present() const { return PADDED ? int(bit_count<SIMD>::of(inside)) : SIMD; }
    int differing() const { return int(bit_count<SIMD>::of(differs)); }
};
#else
template <int SIMD, bool PADDED>
struct sign_counter {
    int inside;
    int differs;
    sign_counter() : inside(0), differs(0) {}
    template <class X>
    void take(int, X x, bool negative) {
        const int code = operand(x);
        const bool here = !PADDED || code != 0;
        inside += here;
        differs += here && (code < 0) != negative;
    }
    int present() const { return inside; }
    int differing() const { return differs; }
};
#endif

}  // namespace edgemat

#endif  // EDGEMAT_SIGNS_HPP
