// SPDX-License-Identifier: Apache-2.0
// ReLU: max(x, 0), exact.
#ifndef EDGEMAT_RELU_HPP
#define EDGEMAT_RELU_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct relu_element {
    static typename C::acc_t at(typename C::x0_t x, int) {
#pragma HLS INLINE
        return x < 0 ? typename C::acc_t(0) : typename C::acc_t(x);
    }
};

template <class C>
void relu(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, relu_element<C> >(x, y);
}

template <class C>
void relu_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                 hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, relu_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_RELU_HPP
