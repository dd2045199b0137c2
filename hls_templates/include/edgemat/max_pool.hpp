// SPDX-License-Identifier: Apache-2.0
// MaxPool; padding never wins.
//
// C: in_h, in_w, in_c, out_h, out_w, kernel_*, stride_*, pad_top, pad_left, dilation_*.
#ifndef EDGEMAT_MAX_POOL_HPP
#define EDGEMAT_MAX_POOL_HPP

#include "edgemat/pool.hpp"

namespace edgemat {

template <class C>
struct max_pool_fold {
    typedef typename C::x0_t state_t;
    static typename C::x0_t fill() {
        typedef code_traits<typename C::x0_t> traits;
        return traits::is_signed ? typename C::x0_t(typename C::x0_t(1) << (traits::width - 1))
                                 : typename C::x0_t(0);
    }
    static state_t start() {
#pragma HLS INLINE
        return fill();
    }
    static state_t step(state_t best, typename C::x0_t x) {
#pragma HLS INLINE
        return x > best ? x : best;
    }
    static typename C::y_t end(state_t best, int, int, int channel) {
#pragma HLS INLINE
        return finish<C>(typename C::acc_t(best), channel);
    }
};

template <class C>
void max_pool(const typename C::x0_t x[C::in_h * C::in_w * C::in_c],
              typename C::y_t y[C::out_h * C::out_w * C::in_c]) {
    pool_array<C, max_pool_fold<C> >(x, y);
}

template <class C>
void max_pool_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                     hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    pool_stream<C, max_pool_fold<C> >(x, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_MAX_POOL_HPP
