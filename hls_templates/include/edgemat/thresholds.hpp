// SPDX-License-Identifier: Apache-2.0
// Thresholds: y = start + step * (thresholds of the channel that x reaches); nothing is multiplied.
//
// C: start, step, count (thresholds of a channel), row_count (1: one row for all channels), search,
//    threshold(part, i). search is
//    COMPARE: a comparator for each threshold, part of `count`; i is the channel.
//    SEARCH: a binary search, part of `levels`; i is the channel, then the path down to that level, each of
//    which reads a memory of its own. The tree is padded with thresholds that no code of x reaches.
#ifndef EDGEMAT_THRESHOLDS_HPP
#define EDGEMAT_THRESHOLDS_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

enum thresholds_kind { COMPARE, SEARCH };

template <class C, int KIND>
struct thresholds_count {
    static typename C::sum_t at(typename C::x0_t x, int row) {
#pragma HLS INLINE
        typename C::sum_t y = typename C::sum_t(C::start);
        for (int part = 0; part < C::count; part++) {
#pragma HLS UNROLL
            if (operand(x) >= operand(C::threshold(part, row))) y += typename C::sum_t(C::step);
        }
        return y;
    }
};

template <class C>
struct thresholds_count<C, SEARCH> {
    static typename C::sum_t at(typename C::x0_t x, int row) {
#pragma HLS INLINE
        typename C::sum_t y = typename C::sum_t(C::start);
        int place = row;
        for (int level = 0; level < C::levels; level++) {
#pragma HLS UNROLL
            // Invariant: place is the row, then one bit for each level passed: whether x reaches its
            // threshold.
            const bool reached = operand(x) >= operand(C::threshold(level, place));
            place = place * 2 + (reached ? 1 : 0);
            if (reached) y += left_shifted(typename C::sum_t(C::step), unsigned(C::levels - 1 - level));
        }
        return y;
    }
};

template <class C>
struct thresholds_element {
    static typename C::acc_t at(typename C::x0_t x, int channel) {
#pragma HLS INLINE
        return typename C::acc_t(thresholds_count<C, C::search>::at(x, C::row_count == 1 ? 0 : channel));
    }
};

template <class C>
void thresholds(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, thresholds_element<C> >(x, y);
}

template <class C>
void thresholds_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                       hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, thresholds_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_THRESHOLDS_HPP
