// SPDX-License-Identifier: Apache-2.0
// Requantize: re-expresses codes in another format; nothing but an epilogue.
#ifndef EDGEMAT_REQUANTIZE_HPP
#define EDGEMAT_REQUANTIZE_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct requantize_element {
    static typename C::acc_t at(typename C::x0_t x, int) {
#pragma HLS INLINE
        return typename C::acc_t(x);
    }
};

template <class C>
void requantize(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, requantize_element<C> >(x, y);
}

template <class C>
void requantize_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                       hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, requantize_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_REQUANTIZE_HPP
