// SPDX-License-Identifier: Apache-2.0
// Affine: scale[channel] * x + bias[channel], exact (fixed-point batch norm).
//
// C: scale(channel), bias(channel): ROM look-ups; product (MULTIPLY or SHIFT_ADD).
#ifndef EDGEMAT_AFFINE_HPP
#define EDGEMAT_AFFINE_HPP

#include "edgemat/dot.hpp"
#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct affine_element {
    static typename C::acc_t at(typename C::x0_t x, int channel) {
#pragma HLS INLINE
        typedef typename C::sum_t sum_t;
        typedef constant_product<C, C::product> product;
        return typename C::acc_t(sum_t(product::at(x, C::scale(channel)) + sum_t(C::bias(channel))));
    }
};

template <class C>
void affine(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, affine_element<C> >(x, y);
}

template <class C>
void affine_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                   hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, affine_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_AFFINE_HPP
