// SPDX-License-Identifier: Apache-2.0
// Mul: x0 * x1, exact.
//
// C: the broadcast of elementwise.hpp.
#ifndef EDGEMAT_MUL_HPP
#define EDGEMAT_MUL_HPP

#include "edgemat/dot.hpp"
#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct mul_element {
    template <class X0, class X1>
    static typename C::acc_t at(X0 x0, X1 x1) {
#pragma HLS INLINE
        return typename C::acc_t(typename C::sum_t(multiply<typename C::sum_t>(x0, x1)));
    }
};

template <class C, class X0, class X1>
void mul(const X0* x0, const X1* x1, typename C::y_t y[C::size]) {
    map_arrays<C, mul_element<C> >(x0, x1, y);
}

template <class C>
void mul_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_streams<C, mul_element<C> >(x0, x1, y);
}

// One operand is a constant array.
template <class C, int K, class T, int LANES, class X>
void mul_constant_stream(hls::stream<vec<T, LANES> >& x, const X* constant,
                         hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_constant<C, mul_element<C>, K>(x, constant, y);
}

// Operands of different shapes.
template <class C>
void mul_held_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x0,
                     hls::stream<vec<typename C::x1_t, C::x1_lanes> >& x1,
                     hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_held<C, mul_element<C> >(x0, x1, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_MUL_HPP
