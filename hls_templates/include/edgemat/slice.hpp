// SPDX-License-Identifier: Apache-2.0
// Slice: a strided part of a tensor. C: that of strided.hpp.
#ifndef EDGEMAT_SLICE_HPP
#define EDGEMAT_SLICE_HPP

#include "edgemat/strided.hpp"

namespace edgemat {

template <class C>
void slice(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
#pragma HLS INLINE
    strided<C>(x, y);
}

template <class C>
void slice_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                  hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    strided_stream<C>(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_SLICE_HPP
