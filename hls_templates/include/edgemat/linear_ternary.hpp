// SPDX-License-Identifier: Apache-2.0
// Linear with weights -1, 0 and +1: additions and subtractions only.
//
// C: rows, in_features, out_features, and what the unit asks for.
// \tparam Unit  ternary_constants, or ternary_rom, ternary_uram or ternary_axi (ternary.hpp)
// \param weights  the biases, or the packed words and the biases
#ifndef EDGEMAT_LINEAR_TERNARY_HPP
#define EDGEMAT_LINEAR_TERNARY_HPP

#include "edgemat/linear_loop.hpp"
#include "edgemat/ternary.hpp"

namespace edgemat {

template <class C, class Unit, class... Weights>
void linear_ternary(const typename C::x0_t x[C::rows * C::in_features],
                    typename C::y_t y[C::rows * C::out_features], Weights... weights) {
    linear_rows<C, Unit>(x, y, weights...);
}

template <class C, class Unit, class... Weights>
void linear_ternary_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                           hls::stream<vec<typename C::y_t, C::y_lanes> >& y, Weights... weights) {
    linear_rows_stream<C, Unit>(x, y, weights...);
}

}  // namespace edgemat

#endif  // EDGEMAT_LINEAR_TERNARY_HPP
