// SPDX-License-Identifier: Apache-2.0
// The second half of rms_norm.hpp and layer_norm.hpp: a row of numerators times the row's scale, gain and
// bias.
//
// C: norm_shift, exponent_max, total_bits, numerator_bits, norm_width, norm_signed, norm_rounding,
// norm_overflow,
//    has_gain and then gain(i), has_bias and then bias(i), total_offset, root.
#ifndef EDGEMAT_ROW_NORM_HPP
#define EDGEMAT_ROW_NORM_HPP

#include "edgemat/dynamic_shift.hpp"
#include "edgemat/reciprocal_root.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

// normalised * gain(i) + bias(i)
template <class C, bool GAIN, bool BIAS>
struct gain_and_bias {
    static typename C::acc_t apply(typename carrier<C::norm_width + 1>::type z, int i) {
#pragma HLS INLINE
        return typename C::acc_t(z * C::gain(i) + C::bias(i));
    }
};
template <class C>
struct gain_and_bias<C, true, false> {
    static typename C::acc_t apply(typename carrier<C::norm_width + 1>::type z, int i) {
#pragma HLS INLINE
        return typename C::acc_t(z * C::gain(i));
    }
};
template <class C>
struct gain_and_bias<C, false, false> {
    static typename C::acc_t apply(typename carrier<C::norm_width + 1>::type z, int) {
#pragma HLS INLINE
        return typename C::acc_t(z);
    }
};

// The scale of a row.
template <class C>
inline scale row_scale(typename carrier<C::total_bits + 2>::type total) {
#pragma HLS INLINE
    typedef typename carrier<C::total_bits + 2>::type total_t;
    return reciprocal_root<C::total_bits, C::exponent_max>(
        ap_uint<C::total_bits>(total_t(total + total_t(C::total_offset))), ap_uint<31>(C::root));
}

// Element i of a row.
template <class C>
inline typename C::y_t normalized(typename carrier<C::numerator_bits>::type numerator, scale row, int i) {
#pragma HLS INLINE
    const int product_bits = C::numerator_bits + 16;
    typedef dynamic_shift<C::norm_rounding, product_bits, C::norm_shift, C::norm_shift + C::exponent_max>
        shift_t;
    typedef typename select<C::norm_signed, ap_int<C::norm_width>, ap_uint<C::norm_width> >::type norm_t;
    typedef typename carrier<17>::type mantissa_t;
    const typename carrier<product_bits>::type product = numerator * mantissa_t(row.mantissa);
    const norm_t z = limit<C::norm_overflow, norm_t, shift_t::width>(
        shift_t::apply(product, int(C::norm_shift) + row.exponent));
    typedef gain_and_bias<C, C::has_gain, C::has_bias> affine_t;
    return finish<C>(affine_t::apply(operand(z), i), i % C::channels);
}

}  // namespace edgemat

#endif  // EDGEMAT_ROW_NORM_HPP
