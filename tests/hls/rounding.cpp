// Compares requantize_code with the conversion of ap_fixed, over every code of a width, for all modes.
#include <cstdio>

#include <ap_fixed.h>

#include "edgemat/rounding.hpp"

using namespace edgemat;

namespace {

long long checked = 0;
long long wrong = 0;

#ifdef MUTATED
const int mode_step = 1;
#else
const int mode_step = 0;
#endif

template <int W, int SHIFT, class Y, int Q, int O, ap_q_mode AP_Q, ap_o_mode AP_O>
void compare() {
    const int width = code_traits<Y>::width;
    const bool is_signed = code_traits<Y>::is_signed;
    // ap_fixed reads bits beyond a narrow operand's own, so the operand is given in a wider type of the same
    // grid.
    const int wide = W + 8;
    typedef typename select<is_signed, ap_fixed<width, width + SHIFT, AP_Q, AP_O>,
                            ap_ufixed<width, width + SHIFT, AP_Q, AP_O> >::type target_t;
    for (int v = -(1 << (W - 1)); v < 1 << (W - 1); v++) {
        const ap_int<wide> bits = v;
        ap_fixed<wide, wide> value;
        value.range() = bits.range();
        const target_t converted = value;
        Y expected;
        expected.range() = converted.range();
        const Y found = requantize_code<(Q + mode_step) % 7, O, SHIFT, SHIFT, Y>(ap_int<W>(v), SHIFT);
        checked++;
        if (found != expected && wrong++ < 5) {
            std::printf(
                "code %d of %d bits, shift %d, to %d bits, rounding %d, overflow %d: found %d, expected %d\n",
                v, W, SHIFT, width, Q, O, found.to_int(), expected.to_int());
        }
    }
}

template <int W, int SHIFT, class Y, int Q, ap_q_mode AP_Q>
void overflows() {
    compare<W, SHIFT, Y, Q, WRAP, AP_Q, AP_WRAP>();
    compare<W, SHIFT, Y, Q, SAT, AP_Q, AP_SAT>();
    compare<W, SHIFT, Y, Q, SAT_SYM, AP_Q, AP_SAT_SYM>();
    compare<W, SHIFT, Y, Q, SAT_ZERO, AP_Q, AP_SAT_ZERO>();
}

template <int W, int SHIFT, class Y>
void roundings() {
    overflows<W, SHIFT, Y, TRN, AP_TRN>();
    overflows<W, SHIFT, Y, TRN_ZERO, AP_TRN_ZERO>();
    overflows<W, SHIFT, Y, RND, AP_RND>();
    overflows<W, SHIFT, Y, RND_ZERO, AP_RND_ZERO>();
    overflows<W, SHIFT, Y, RND_INF, AP_RND_INF>();
    overflows<W, SHIFT, Y, RND_MIN_INF, AP_RND_MIN_INF>();
    overflows<W, SHIFT, Y, RND_CONV, AP_RND_CONV>();
}

}  // namespace

int main() {
    roundings<8, 0, ap_int<4> >();
    roundings<8, 1, ap_int<6> >();
    roundings<8, 3, ap_uint<4> >();
    roundings<8, 8, ap_int<4> >();
    roundings<8, 10, ap_int<2> >();
    roundings<6, -2, ap_int<8> >();
    roundings<6, -1, ap_uint<5> >();
    roundings<10, 4, ap_int<6> >();
    // A channel's own shift, below the largest one.
    for (int v = -128; v < 128; v++) {
        for (int shift = -2; shift <= 5; shift++) {
            const ap_int<8> spread = requantize_code<RND_CONV, SAT, -2, 5, ap_int<8> >(ap_int<8>(v), shift);
            ap_fixed<24, 16> value = v;
            if (shift > 0) value >>= shift;
            if (shift < 0) value <<= -shift;
            const ap_fixed<8, 8, AP_RND_CONV, AP_SAT> expected = value;
            checked++;
            if (spread.to_int() != expected.to_int()) wrong++;
        }
    }
    std::printf("%lld codes, %lld wrong\n", checked, wrong);
    return wrong == 0 ? 0 : 1;
}
