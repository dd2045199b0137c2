// SPDX-License-Identifier: Apache-2.0
// Softmax along one axis: e = exp_table[max - x], y = overflow(round((e << frac_bits) / sum(e))), one
// rounding.
//
// C: outer, axis_size, inner, frac_bits, exp_width (bits of a table entry), rounding, overflow,
// exp_table(index);
//    x0_size, y_size.
#ifndef EDGEMAT_SOFTMAX_HPP
#define EDGEMAT_SOFTMAX_HPP

#include "edgemat/quotient.hpp"
#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void softmax(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    const int numerator_width = C::exp_width + C::frac_bits + 2;
    typedef typename carrier<numerator_width>::type numerator_t;
    typedef typename carrier<code_traits<typename C::acc_t>::width + 2>::type divisor_t;
    numerator_t exponential[C::axis_size];
    for (int o = 0; o < C::outer; o++) {
        for (int i = 0; i < C::inner; i++) {
            const int base = o * C::axis_size * C::inner + i;
            typename C::x0_t best = x[base];
            for (int a = 1; a < C::axis_size; a++) {
#pragma HLS PIPELINE II = 1
                const typename C::x0_t code = x[base + a * C::inner];
                if (code > best) best = code;
            }
            divisor_t total = 0;
            for (int a = 0; a < C::axis_size; a++) {
#pragma HLS PIPELINE II = 1
                const int distance =
                    static_cast<int>(operand(best)) - static_cast<int>(operand(x[base + a * C::inner]));
                exponential[a] = C::exp_table(distance);
                total += divisor_t(exponential[a]);
            }
            for (int a = 0; a < C::axis_size; a++) {
#pragma HLS PIPELINE II = 1
                const numerator_t numerator = exponential[a] * (numerator_t(1) << C::frac_bits);
                const numerator_t floor_code = numerator / total;
                y[base + a * C::inner] = limit<C::overflow, typename C::y_t, numerator_width>(
                    round_quotient<C::rounding>(numerator, total, floor_code));
            }
        }
    }
}

// Holds one sample, then runs the array form.
template <class C>
void softmax_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                    hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    softmax<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_SOFTMAX_HPP
