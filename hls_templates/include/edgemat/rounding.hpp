// SPDX-License-Identifier: Apache-2.0
// The only inexact operation: code_out = overflow(round(code_in * 2**-shift)), round first, then overflow.
#ifndef EDGEMAT_ROUNDING_HPP
#define EDGEMAT_ROUNDING_HPP

#include "edgemat/types.hpp"

namespace edgemat {

// The seven rounding modes; each equals the AP_ mode of the same name.
enum rounding_mode { TRN, TRN_ZERO, RND, RND_ZERO, RND_INF, RND_MIN_INF, RND_CONV };
// The four overflow modes, and that of bipolar codes: -1 below 0, else +1.
enum overflow_mode { WRAP, SAT, SAT_SYM, SAT_ZERO, SIGN };

// Whether the floor must be incremented. `negative`: sign of the exact value; `half`: the fraction is at
// least one half; `rest`: the fraction differs from 0 and from one half (below or above); `odd`: lowest bit
// of the floor.
template <int ROUNDING>
inline bool rounds_up(bool negative, bool half, bool rest, bool odd) {
#pragma HLS INLINE
    return ROUNDING == TRN_ZERO      ? negative && (half || rest)
           : ROUNDING == RND         ? half
           : ROUNDING == RND_ZERO    ? half && (rest || negative)
           : ROUNDING == RND_INF     ? half && (rest || !negative)
           : ROUNDING == RND_MIN_INF ? half && rest
           : ROUNDING == RND_CONV    ? half && (rest || odd)
                                     : false;
}

// A code shifted left, which C++14 does not define for negative native integers; the caller's type holds it.
inline int left_shifted(int code, unsigned bits) {
#pragma HLS INLINE
    return static_cast<int>(static_cast<unsigned>(code) << bits);
}
inline long long left_shifted(long long code, unsigned bits) {
#pragma HLS INLINE
    return static_cast<long long>(static_cast<unsigned long long>(code) << bits);
}
template <int W>
inline ap_int<W> left_shifted(ap_int<W> code, unsigned bits) {
#pragma HLS INLINE
    return code << bits;
}

// A rounded right shift by SHIFT > 0 bits of a code that W bits hold.
template <int ROUNDING, int SHIFT, bool RIGHT>
struct shifter {
    template <int W>
    struct bits {
        static const int guarded = (W > SHIFT ? W : SHIFT) + 1;
        static const int result = (W > SHIFT ? W - SHIFT : 1) + 1;
    };
    template <int W>
    static typename carrier<bits<W>::result>::type apply(typename carrier<W>::type code) {
#pragma HLS INLINE
        typedef typename carrier<bits<W>::guarded>::type wide_t;
        const wide_t wide = code;
        const wide_t floor_code = wide >> SHIFT;
        const bool half = ((wide >> (SHIFT - 1)) & 1) != 0;
        const bool rest = (wide & wide_t((wide_t(1) << (SHIFT - 1)) - 1)) != 0;
        const bool odd = (floor_code & 1) != 0;
        typename carrier<bits<W>::result>::type rounded = floor_code;
        if (rounds_up<ROUNDING>(code < 0, half, rest, odd)) rounded += 1;
        return rounded;
    }
};
// An exact left shift by -SHIFT bits.
template <int ROUNDING, int SHIFT>
struct shifter<ROUNDING, SHIFT, false> {
    template <int W>
    struct bits {
        static const int result = W - SHIFT;
    };
    template <int W>
    static typename carrier<W - SHIFT>::type apply(typename carrier<W>::type code) {
#pragma HLS INLINE
        typedef typename carrier<W - SHIFT + 1>::type wide_t;
        return left_shifted(wide_t(code), unsigned(-SHIFT));
    }
};

// Bring a code that W bits hold into the code type Y.
template <int OVERFLOW, class Y, int W>
inline Y limit(typename carrier<W>::type code) {
#pragma HLS INLINE
    const int y_width = code_traits<Y>::width;
    const bool y_signed = code_traits<Y>::is_signed;
    if (OVERFLOW == SIGN) return code < 0 ? Y(-1) : Y(1);
    if (OVERFLOW == WRAP || (y_signed && W <= y_width && OVERFLOW != SAT_SYM)) return Y(code);
    typedef typename carrier<y_width + 2>::type bound_t;
    const bound_t above = bound_t(1) << (y_signed ? y_width - 1 : y_width);
    const bound_t high = above - 1;
    const bound_t low = y_signed ? bound_t(OVERFLOW == SAT_SYM ? 1 - above : 0 - above) : bound_t(0);
    if (code > high) return OVERFLOW == SAT_ZERO ? Y(0) : Y(high);
    if (code < low) return OVERFLOW == SAT_ZERO ? Y(0) : Y(low);
    return Y(code);
}

// The same for a channel whose code has `bits` bits, 0 (the code is always 0) to those of Y. The two shifts
// at the end change nothing (under WRAP they take the code's lowest bits); where `bits` is constant they tell
// the synthesiser how narrow the code is.
template <int OVERFLOW, class Y, int W>
inline Y limit_channel(typename carrier<W>::type code, int bits) {
#pragma HLS INLINE
    const int y_width = code_traits<Y>::width;
    const bool y_signed = code_traits<Y>::is_signed;
    if (bits == 0) return Y(0);
    typedef typename carrier<y_width + 2>::type bound_t;
    const bound_t above = bound_t(1) << (y_signed ? bits - 1 : bits);
    const bound_t high = above - 1;
    const bound_t low = y_signed ? bound_t(OVERFLOW == SAT_SYM ? 1 - above : 0 - above) : bound_t(0);
    const Y limited = OVERFLOW == WRAP ? Y(code) : code > high ? Y(high) : code < low ? Y(low) : Y(code);
    const int spare = y_width - bits;
    return Y(Y(limited << spare) >> spare);
}

// Round one code; `result` bits hold what comes out.
// \tparam ROUNDING  mode
// \tparam SHIFT_MIN, SHIFT_MAX  bounds of `shift` over all channels; equal when there is one binary point
template <int ROUNDING, int SHIFT_MIN, int SHIFT_MAX, int W>
struct rounder {
    // Align all channels to the largest shift, so that one constant rounding position serves them all.
    static const int width = W + SHIFT_MAX - SHIFT_MIN;
    typedef shifter<ROUNDING, SHIFT_MAX, (SHIFT_MAX > 0)> shifter_t;
    static const int result = shifter_t::template bits<width>::result;
    static typename carrier<result>::type apply(ap_int<W> code, int shift) {
#pragma HLS INLINE
        typedef typename carrier<width + 1>::type wide_t;
        typename carrier<width>::type aligned = operand(code);
        if (SHIFT_MAX > SHIFT_MIN) aligned = left_shifted(wide_t(aligned), unsigned(SHIFT_MAX - shift));
        return shifter_t::template apply<width>(aligned);
    }
};

// Requantize one code.
// \tparam ROUNDING, OVERFLOW  modes
// \tparam SHIFT_MIN, SHIFT_MAX  bounds of `shift` over all channels; equal when there is one binary point
// \tparam Y  code type of the result
// \param shift  right shift of this channel, in bits; negative shifts left
template <int ROUNDING, int OVERFLOW, int SHIFT_MIN, int SHIFT_MAX, class Y, int W>
inline Y requantize_code(ap_int<W> code, int shift) {
#pragma HLS INLINE
    typedef rounder<ROUNDING, SHIFT_MIN, SHIFT_MAX, W> rounder_t;
    return limit<OVERFLOW, Y, rounder_t::result>(rounder_t::apply(code, shift));
}

// Requantize one code of a channel of `bits` bits.
template <int ROUNDING, int OVERFLOW, int SHIFT_MIN, int SHIFT_MAX, class Y, int W>
inline Y requantize_channel(ap_int<W> code, int shift, int bits) {
#pragma HLS INLINE
    typedef rounder<ROUNDING, SHIFT_MIN, SHIFT_MAX, W> rounder_t;
    return limit_channel<OVERFLOW, Y, rounder_t::result>(rounder_t::apply(code, shift), bits);
}

// The epilogue of an operator: `exact` is the accumulator's code, C tells whether and how it is requantised.
// C: acc_t, y_t, requantized, rounding, overflow, shift_min, shift_max, shift(channel), narrowed (channels
// have widths of their own) and then bits(channel).
template <class C, bool NARROWED>
struct requantizer {
    static typename C::y_t apply(typename C::acc_t exact, int channel) {
#pragma HLS INLINE
        return requantize_channel<C::rounding, C::overflow, C::shift_min, C::shift_max, typename C::y_t>(
            exact, C::shift(channel), C::bits(channel));
    }
};
template <class C>
struct requantizer<C, false> {
    static typename C::y_t apply(typename C::acc_t exact, int channel) {
#pragma HLS INLINE
        return requantize_code<C::rounding, C::overflow, C::shift_min, C::shift_max, typename C::y_t>(
            exact, C::shift(channel));
    }
};
template <class C, bool REQUANTIZED>
struct epilogue {
    static typename C::y_t apply(typename C::acc_t exact, int channel) {
#pragma HLS INLINE
        return requantizer<C, C::narrowed>::apply(exact, channel);
    }
};
template <class C>
struct epilogue<C, false> {
    static typename C::y_t apply(typename C::acc_t exact, int) {
#pragma HLS INLINE
        return typename C::y_t(exact);
    }
};
template <class C>
inline typename C::y_t finish(typename C::acc_t exact, int channel) {
#pragma HLS INLINE
    return epilogue<C, C::requantized>::apply(exact, channel);
}

}  // namespace edgemat

#endif  // EDGEMAT_ROUNDING_HPP
