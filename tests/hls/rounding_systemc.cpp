// Compares requantize_code with SystemC's sc_fixed, an oracle that shares no code with ap_fixed.
#define SC_INCLUDE_FX
#include <cmath>
#include <cstdio>

#include <systemc.h>

#include "edgemat/rounding.hpp"

namespace {

long long checked = 0;
long long wrong = 0;

template <int W, int SHIFT, class Y, int Q, int O, sc_q_mode SC_Q, sc_o_mode SC_O>
void compare() {
    const int width = edgemat::code_traits<Y>::width;
    typedef typename edgemat::select<edgemat::code_traits<Y>::is_signed,
                                     sc_fixed<width, width + SHIFT, SC_Q, SC_O>,
                                     sc_ufixed<width, width + SHIFT, SC_Q, SC_O> >::type target_t;
    for (int v = -(1 << (W - 1)); v < 1 << (W - 1); v++) {
        const target_t converted = sc_fixed<W + 8, W + 8>(v);
        const int expected = static_cast<int>(std::ldexp(converted.to_double(), -SHIFT));
        const Y found = edgemat::requantize_code<Q, O, SHIFT, SHIFT, Y>(ap_int<W>(v), SHIFT);
        checked++;
        if (found.to_int() != expected && wrong++ < 5) {
            std::printf("code %d, shift %d, to %d bits, rounding %d, overflow %d: found %d, expected %d\n", v,
                        SHIFT, width, Q, O, found.to_int(), expected);
        }
    }
}

template <int W, int SHIFT, class Y, int Q, sc_q_mode SC_Q>
void overflows() {
    compare<W, SHIFT, Y, Q, edgemat::WRAP, SC_Q, SC_WRAP>();
    compare<W, SHIFT, Y, Q, edgemat::SAT, SC_Q, SC_SAT>();
    compare<W, SHIFT, Y, Q, edgemat::SAT_SYM, SC_Q, SC_SAT_SYM>();
    compare<W, SHIFT, Y, Q, edgemat::SAT_ZERO, SC_Q, SC_SAT_ZERO>();
}

template <int W, int SHIFT, class Y>
void roundings() {
    overflows<W, SHIFT, Y, edgemat::TRN, SC_TRN>();
    overflows<W, SHIFT, Y, edgemat::TRN_ZERO, SC_TRN_ZERO>();
    overflows<W, SHIFT, Y, edgemat::RND, SC_RND>();
    overflows<W, SHIFT, Y, edgemat::RND_ZERO, SC_RND_ZERO>();
    overflows<W, SHIFT, Y, edgemat::RND_INF, SC_RND_INF>();
    overflows<W, SHIFT, Y, edgemat::RND_MIN_INF, SC_RND_MIN_INF>();
    overflows<W, SHIFT, Y, edgemat::RND_CONV, SC_RND_CONV>();
}

}  // namespace

int sc_main(int, char**) {
    roundings<8, 0, ap_int<4> >();
    roundings<8, 3, ap_int<4> >();
    roundings<8, 2, ap_uint<5> >();
    roundings<8, 8, ap_int<3> >();
    roundings<6, -2, ap_int<8> >();
    std::printf("%lld codes, %lld wrong\n", checked, wrong);
    return wrong == 0 ? 0 : 1;
}
