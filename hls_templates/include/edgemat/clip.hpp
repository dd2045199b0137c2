// SPDX-License-Identifier: Apache-2.0
// Clip: min(max(x << align, low), high), exact.
//
// C: low, high (codes after the shift), align.
#ifndef EDGEMAT_CLIP_HPP
#define EDGEMAT_CLIP_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct clip_element {
    static typename C::acc_t at(typename C::x0_t x, int) {
#pragma HLS INLINE
        typedef typename carrier<code_traits<typename C::x0_t>::width + C::align + 2>::type wide_t;
        const wide_t code = left_shifted(wide_t(operand(x)), C::align);
        const long long low = C::low;
        const long long high = C::high;
        if (code < low) return typename C::acc_t(low);
        if (code > high) return typename C::acc_t(high);
        return typename C::acc_t(code);
    }
};

template <class C>
void clip(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, clip_element<C> >(x, y);
}

template <class C>
void clip_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, clip_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_CLIP_HPP
