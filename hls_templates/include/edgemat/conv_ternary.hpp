// SPDX-License-Identifier: Apache-2.0
// Conv with weights -1, 0 and +1: additions and subtractions only.
//
// C: the geometry of conv.hpp, and what the unit asks for.
// \tparam Unit  ternary_constants, or ternary_rom, ternary_uram or ternary_axi (ternary.hpp)
// \param weights  the biases, or the packed words and the biases
#ifndef EDGEMAT_CONV_TERNARY_HPP
#define EDGEMAT_CONV_TERNARY_HPP

#include "edgemat/conv_loop.hpp"
#include "edgemat/ternary.hpp"

namespace edgemat {

template <class C, class Unit, class... Weights>
void conv_ternary(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
                  typename C::y_t y[C::out_h * C::out_w * C::out_c], Weights... weights) {
    conv_pixels<C, Unit>(x, y, weights...);
}

template <class C, class Unit, class... Weights>
void conv_ternary_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                         hls::stream<vec<typename C::y_t, C::y_lanes> >& y, Weights... weights) {
    conv_pixels_stream<C, Unit>(x, y, weights...);
}

}  // namespace edgemat

#endif  // EDGEMAT_CONV_TERNARY_HPP
