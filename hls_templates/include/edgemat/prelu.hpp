// SPDX-License-Identifier: Apache-2.0
// PReLU and LeakyReLU with a fixed-point slope: x << align where x >= 0, else slope[channel] * x; exact.
//
// C: slope(channel), slope_count (1: one slope for all), align, product (MULTIPLY or SHIFT_ADD).
#ifndef EDGEMAT_PRELU_HPP
#define EDGEMAT_PRELU_HPP

#include "edgemat/dot.hpp"
#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct prelu_element {
    static typename C::acc_t at(typename C::x0_t x, int channel) {
#pragma HLS INLINE
        typedef typename C::sum_t sum_t;
        if (x >= 0) return typename C::acc_t(shifted<C, C::align>(x));
        typedef constant_product<C, C::product> product;
        return typename C::acc_t(sum_t(product::at(x, C::slope(C::slope_count == 1 ? 0 : channel))));
    }
};

template <class C>
void prelu(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, prelu_element<C> >(x, y);
}

template <class C>
void prelu_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                  hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, prelu_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_PRELU_HPP
