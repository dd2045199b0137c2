// SPDX-License-Identifier: Apache-2.0
// Table: a function looked up by code.
//
// C: x_min (the code of entry 0), table(index).
#ifndef EDGEMAT_TABLE_HPP
#define EDGEMAT_TABLE_HPP

#include "edgemat/elementwise.hpp"

namespace edgemat {

template <class C>
struct table_element {
    static typename C::acc_t at(typename C::x0_t x, int) {
#pragma HLS INLINE
        const long long code = operand(x);
        return typename C::acc_t(C::table(static_cast<int>(code - C::x_min)));
    }
};

template <class C>
void table(const typename C::x0_t x[C::size], typename C::y_t y[C::size]) {
    map_array<C, table_element<C> >(x, y);
}

template <class C>
void table_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                  hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    map_stream<C, table_element<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_TABLE_HPP
