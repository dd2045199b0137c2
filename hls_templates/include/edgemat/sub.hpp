// SPDX-License-Identifier: Apache-2.0
// Sub: (x0 << align0) - (x1 << align1), exact.
//
// C: align0, align1 and the broadcast of elementwise.hpp.
#ifndef EDGEMAT_SUB_HPP
#define EDGEMAT_SUB_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct sub_element {
    template <class X0, class X1>
    static typename C::acc_t at(X0 x0, X1 x1) {
#pragma HLS INLINE
        return typename C::acc_t(typename C::sum_t(shifted<C, C::align0>(x0) - shifted<C, C::align1>(x1)));
    }
};

template <class C, class X0, class X1>
void sub(const X0* x0, const X1* x1, typename C::y_t y[C::size]) {
    map_arrays<C, sub_element<C> >(x0, x1, y);
}

template <class C>
void sub_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_streams<C, sub_element<C> >(x0, x1, y);
}

// One operand is a constant array.
template <class C, int K, class T, int LANES, class X>
void sub_constant_stream(hls::stream<vec<T, LANES> >& x, const X* constant,
                         hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_constant<C, sub_element<C>, K>(x, constant, y);
}

// Operands of different shapes.
template <class C>
void sub_held_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                     hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                     hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_held<C, sub_element<C> >(x0, x1, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_SUB_HPP
