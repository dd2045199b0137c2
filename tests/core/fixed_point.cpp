// Every conversion of all 10-bit codes into every target format, by ap_fixed or by SystemC's sc_fix.
//
// For each (signed, width 1..10, int_bits, rounding, overflow), in that order of loops, the program writes
// the 1024 codes of the results as int16, little-endian. The source format has 10 bits, 4 of them integer
// bits. The int_bits are 2, -1 and width + 2; of those ap_fixed, which compiles slowly, takes one per width:
// number (width + signed) % 3.

#include <cstdint>
#include <cstdio>

static const int source_int_bits = 4;

static void put(int code) {
    const int16_t value = static_cast<int16_t>(code);
    std::fwrite(&value, sizeof value, 1, stdout);
}

#ifdef USE_SYSTEMC

#define SC_INCLUDE_FX
#include <systemc>

static const sc_dt::sc_q_mode roundings[] = {sc_dt::SC_TRN,      sc_dt::SC_TRN_ZERO, sc_dt::SC_RND,
                                             sc_dt::SC_RND_ZERO, sc_dt::SC_RND_INF,  sc_dt::SC_RND_MIN_INF,
                                             sc_dt::SC_RND_CONV};
static const sc_dt::sc_o_mode overflows[] = {sc_dt::SC_WRAP, sc_dt::SC_SAT, sc_dt::SC_SAT_SYM,
                                             sc_dt::SC_SAT_ZERO};

template <typename Target>
static void formats() {
    for (int width = 1; width <= 10; ++width) {
        const int points[] = {2, -1, width + 2};
        for (int point : points) {
            for (sc_dt::sc_q_mode rounding : roundings) {
                for (sc_dt::sc_o_mode overflow : overflows) {
                    Target y(width, point, rounding, overflow);
                    for (int code = -512; code < 512; ++code) {
                        y = code / 64.0;
                        double scaled = y.to_double();
                        for (int i = point; i < width; ++i) scaled *= 2;
                        for (int i = width; i < point; ++i) scaled /= 2;
                        put(static_cast<int>(scaled));
                    }
                }
            }
        }
    }
}

int sc_main(int, char**) {
    formats<sc_dt::sc_fix>();
    formats<sc_dt::sc_ufix>();
    return 0;
}

#else

#include <ap_fixed.h>

template <typename Target>
static void codes() {
    for (int code = -512; code < 512; ++code) {
        ap_fixed<10, source_int_bits> x;
        x.range() = code;
        const Target y = x;
        Target copy = y;
        const int raw = copy.range().to_int();
        put(copy.is_neg() ? raw - (1 << Target::width) : raw);
    }
}

template <template <int, int, ap_q_mode, ap_o_mode, int> class Kind, int width, int point, ap_q_mode rounding>
static void overflows() {
    codes<Kind<width, point, rounding, AP_WRAP, 0> >();
    codes<Kind<width, point, rounding, AP_SAT, 0> >();
    codes<Kind<width, point, rounding, AP_SAT_SYM, 0> >();
    codes<Kind<width, point, rounding, AP_SAT_ZERO, 0> >();
}

template <template <int, int, ap_q_mode, ap_o_mode, int> class Kind, int width, int point>
static void roundings() {
    overflows<Kind, width, point, AP_TRN>();
    overflows<Kind, width, point, AP_TRN_ZERO>();
    overflows<Kind, width, point, AP_RND>();
    overflows<Kind, width, point, AP_RND_ZERO>();
    overflows<Kind, width, point, AP_RND_INF>();
    overflows<Kind, width, point, AP_RND_MIN_INF>();
    overflows<Kind, width, point, AP_RND_CONV>();
}

template <template <int, int, ap_q_mode, ap_o_mode, int> class Kind, int width, int is_signed>
struct Widths {
    static const int choice = (width + is_signed) % 3;
    static const int point = choice == 0 ? 2 : choice == 1 ? -1 : width + 2;

    static void run() {
        Widths<Kind, width - 1, is_signed>::run();
        roundings<Kind, width, point>();
    }
};

template <template <int, int, ap_q_mode, ap_o_mode, int> class Kind, int is_signed>
struct Widths<Kind, 0, is_signed> {
    static void run() {}
};

int main() {
    Widths<ap_fixed, 10, 1>::run();
    Widths<ap_ufixed, 10, 0>::run();
    return 0;
}

#endif
