// SPDX-License-Identifier: Apache-2.0
// The ternary unit and the row-wise unit by themselves, without a generated project.
//
// Prints "exact" when both give what plain loops over native integers give.
#include <cstdio>

#include "edgemat/row_operation.hpp"
#include "edgemat/ternary.hpp"

namespace {

const int outputs = 6, inputs = 11;

// Two rows of five trits a step: three steps a row, the last of which is filled up with zeros.
struct unit {
    typedef ap_int<8> x0_t;
    typedef ap_int<12> acc_t;
    typedef edgemat::sum<acc_t, 12>::type sum_t;
    typedef edgemat::constant<4, true>::type bias_t;
    typedef ap_int<12> y_t;
    typedef ap_uint<32> weight_t;
    static const int pe = 2, simd = 5, chunks = 3, packing = 5, row_bytes = 1, step_words = 1,
                     step_cycles = 1;
    static const bool requantized = false;
};

struct half {
    typedef ap_int<9> acc_t;
    typedef ap_int<6> y_t;
    static const bool requantized = true, narrowed = false;
    static const int rounding = edgemat::RND, overflow = edgemat::SAT;
    static const int shift_min = 1, shift_max = 1;
    static int shift(int) { return 1; }
};

unsigned state = 1;
int draw(int low, int high) {
    state = state * 1664525u + 1013904223u;
    return low + static_cast<int>((state >> 8) % static_cast<unsigned>(high - low + 1));
}

bool matrix() {
    int weight[outputs][unit::chunks * unit::simd] = {};
    unit::x0_t x[inputs];
    unit::y_t y[outputs];
    unit::bias_t bias[outputs];
    ap_uint<32> words[outputs / unit::pe * unit::chunks];
    for (int i = 0; i < inputs; i++) x[i] = draw(-128, 127);
    for (int o = 0; o < outputs; o++) {
        bias[o] = static_cast<signed char>(draw(-8, 7));
        for (int i = 0; i < inputs; i++) weight[o][i] = draw(-1, 1);
    }
    for (int step = 0; step < outputs / unit::pe * unit::chunks; step++) {
        words[step] = 0;
        for (int p = 0; p < unit::pe; p++) {
            int byte = 0;
            for (int t = 4; t >= 0; t--) {
                byte = 3 * byte +
                       weight[step / unit::chunks * unit::pe + p][step % unit::chunks * unit::simd + t] + 1;
            }
            words[step].range(8 * p + 7, 8 * p) = byte;
        }
    }
    edgemat::ternary_axi::dot<unit, outputs, inputs, inputs, 1>(x, y, words, bias);
    bool same = true;
    for (int o = 0; o < outputs; o++) {
        int sum = int(bias[o]);
        for (int i = 0; i < inputs; i++) sum += weight[o][i] * x[i].to_int();
        same = same && y[o] == sum;
    }
    return same;
}

bool rows() {
    ap_int<8> a[inputs], b[inputs];
    ap_int<6> y[inputs];
    hls::stream<edgemat::vec<ap_int<8>, inputs> > left, right;
    hls::stream<edgemat::vec<ap_int<9>, inputs> > sums;
    edgemat::vec<ap_int<8>, inputs> beat_a, beat_b;
    for (int i = 0; i < inputs; i++) {
        beat_a[i] = a[i] = draw(-128, 127);
        beat_b[i] = b[i] = draw(-128, 127);
    }
    edgemat::row_operation<edgemat::finished<half, edgemat::row_difference>, inputs, 4>(y, a, b);
    left.write(beat_a);
    right.write(beat_b);
    edgemat::row_operation_stream<edgemat::row_sum, inputs>(sums, left, right);
    const edgemat::vec<ap_int<9>, inputs> sum = sums.read();
    bool same = true;
    for (int i = 0; i < inputs; i++) {
        const int rounded = (a[i].to_int() - b[i].to_int() + 1) >> 1;
        const int limited = rounded > 31 ? 31 : rounded < -32 ? -32 : rounded;
        same = same && y[i] == limited && sum[i] == a[i].to_int() + b[i].to_int();
        same = same && edgemat::row_maximum::at(a[i], b[i]) == (a[i] < b[i] ? b[i] : a[i]);
    }
    return same;
}

}  // namespace

int main() {
    bool same = true;
    for (int i = 0; i < 200; i++) same = matrix() && rows() && same;
    std::puts(same ? "exact" : "WRONG");
    return same ? 0 : 1;
}
