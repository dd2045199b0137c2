// SPDX-License-Identifier: Apache-2.0
// round(code * 2**-shift) where the shift is known at run time only: one for each row.
#ifndef EDGEMAT_DYNAMIC_SHIFT_HPP
#define EDGEMAT_DYNAMIC_SHIFT_HPP

#include "edgemat/rounding.hpp"

namespace edgemat {

// Round a code that W bits hold by a shift in SHIFT_MIN .. SHIFT_MAX; negative shifts left, exactly.
// \tparam ROUNDING  mode
// `width` bits hold what comes out.
template <int ROUNDING, int W, int SHIFT_MIN, int SHIFT_MAX>
struct dynamic_shift {
    static const int left = SHIFT_MIN < 0 ? -SHIFT_MIN : 0;
    static const int width = (W > SHIFT_MAX ? W : SHIFT_MAX) + left + 2;
    typedef typename carrier<width>::type code_t;
    static code_t apply(code_t code, int shift) {
#pragma HLS INLINE
        if (SHIFT_MIN < 0 && shift < 0) return left_shifted(code, unsigned(-shift));
        if (shift <= 0) return code;
        const code_t floor_code = code >> shift;
        const bool half = ((code >> (shift - 1)) & 1) != 0;
        const bool rest = (code & code_t((code_t(1) << (shift - 1)) - 1)) != 0;
        const bool odd = (floor_code & 1) != 0;
        code_t rounded = floor_code;
        if (rounds_up<ROUNDING>(code < 0, half, rest, odd)) rounded += 1;
        return rounded;
    }
};

}  // namespace edgemat

#endif  // EDGEMAT_DYNAMIC_SHIFT_HPP
