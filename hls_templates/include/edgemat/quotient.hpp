// SPDX-License-Identifier: Apache-2.0
// Rounded quotients of codes.
#ifndef EDGEMAT_QUOTIENT_HPP
#define EDGEMAT_QUOTIENT_HPP

#include "edgemat/rounding.hpp"

namespace edgemat {

// numerator / divisor rounded to an integer, given its floor; divisor > 0.
template <int ROUNDING, class N, class D>
inline N round_quotient(N numerator, D divisor, N floor_code) {
#pragma HLS INLINE
    const D remainder = numerator - floor_code * divisor;
    const D twice = remainder + remainder;
    const bool rest = remainder != 0 && twice != divisor;
    N rounded = floor_code;
    if (rounds_up<ROUNDING>(floor_code < 0, twice >= divisor, rest, (floor_code & 1) != 0)) rounded += 1;
    return rounded;
}

}  // namespace edgemat

#endif  // EDGEMAT_QUOTIENT_HPP
