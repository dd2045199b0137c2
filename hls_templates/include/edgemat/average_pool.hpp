// SPDX-License-Identifier: Apache-2.0
// AveragePool: round(sum * 2**-shift / count) as one exact rational, then overflow.
//
// C: in_h, in_w, in_c, out_h, out_w, kernel_*, stride_*, pad_top, pad_left, dilation_* (1);
//    count_include_pad, count (kernel area; the divisor where padding counts), pad_bottom, pad_right;
//    for a constant divisor den = count << max(shift_max, 0): multiplier, multiplier_shift and offset, such
//    that floor(n / den) == ((n + offset * den) * multiplier >> multiplier_shift) - offset for every n the
//    range proof allows (Granlund and Montgomery, "Division by invariant integers", theorem 4.2); multiplier
//    0 divides instead.
#ifndef EDGEMAT_AVERAGE_POOL_HPP
#define EDGEMAT_AVERAGE_POOL_HPP

#include "edgemat/pool.hpp"
#include "edgemat/quotient.hpp"

namespace edgemat {

template <class C>
struct average_pool_fold {
    typedef typename C::sum_t state_t;
    static typename C::x0_t fill() { return 0; }
    static state_t start() {
#pragma HLS INLINE
        return 0;
    }
    static state_t step(state_t sum, typename C::x0_t x) {
#pragma HLS INLINE
        return state_t(sum + state_t(operand(x)));
    }
    // Elements along one axis that count: inside the map, or also inside its padding.
    static int counted(int first, int kernel, int low, int high) {
#pragma HLS INLINE
        const int begin = first < low ? low : first;
        const int end = first + kernel > high ? high : first + kernel;
        return end - begin;
    }
    static int count(int row, int col) {
#pragma HLS INLINE
        if (C::uniform_count) return C::count;
        const int top = row * C::stride_h - C::pad_top;
        const int left = col * C::stride_w - C::pad_left;
        const int margin = C::count_include_pad;
        return counted(top, C::kernel_h, -margin * C::pad_top, C::in_h + margin * C::pad_bottom) *
               counted(left, C::kernel_w, -margin * C::pad_left, C::in_w + margin * C::pad_right);
    }
    static typename C::y_t end(state_t sum, int row, int col, int channel) {
#pragma HLS INLINE
        const int up = C::shift_max > 0 ? 0 : -C::shift_max;
        const int down = C::shift_max > 0 ? C::shift_max : 0;
        const int width = code_traits<typename C::acc_t>::width + C::shift_max - C::shift_min + up + 2;
        typedef typename carrier<width>::type numerator_t;
        typedef typename carrier<C::count_width + down + 3>::type divisor_t;
        numerator_t numerator = sum;
        numerator = numerator * (numerator_t(1) << (C::shift_max - C::shift(channel) + up));
        const divisor_t divisor = divisor_t(count(row, col)) * (divisor_t(1) << down);
        numerator_t floor_code;
        if (C::multiplier > 0) {
            typedef typename carrier<C::product_width>::type product_t;
            const product_t positive = product_t(numerator) + product_t(C::offset) * product_t(divisor);
            floor_code =
                numerator_t((positive * product_t(C::multiplier)) >> C::multiplier_shift) - C::offset;
        } else {
            floor_code = numerator / divisor;
            if (floor_code * divisor > numerator) floor_code -= 1;
        }
        const numerator_t rounded = round_quotient<C::rounding>(numerator, divisor, floor_code);
        return limit<C::overflow, typename C::y_t, width>(rounded);
    }
};

template <class C>
void average_pool(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
                  typename C::y_t y[C::out_h * C::out_w * C::in_c]) {
    pool_array<C, average_pool_fold<C> >(x, y);
}

template <class C>
void average_pool_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                         hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    pool_stream<C, average_pool_fold<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_AVERAGE_POOL_HPP
