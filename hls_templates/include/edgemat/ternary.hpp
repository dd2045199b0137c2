// SPDX-License-Identifier: Apache-2.0
// Ternary sums: y[o] = finish(bias[o] + sum_k w[o][k] x[k]) for weights -1, 0 and +1, from additions and
// subtractions alone.
//
// Four units give one result and differ in where the weights are:
//   ternary_constants  in the structure: one tree of adders per output, weights 0 leave nothing behind
//   ternary_rom        packed, in a ROM
//   ternary_uram       packed, in UltraRAM that the first call fills from an AXI memory
//   ternary_axi        packed, read from an AXI memory each time
// A unit's `dot` takes the inputs, the results, the packed words (not ternary_constants) and the biases.
//
// C of all: x0_t, bias_t, acc_t, sum_t, y_t and the epilogue.
// C of ternary_constants: first(o), split(o), tap(i): output o adds the inputs tap(i) for first(o) <= i <
//     split(o) and subtracts those for split(o) <= i < first(o + 1); constant expressions.
// C of the others: pe (divides the outputs) and simd, outputs and terms per step; chunks, steps of one output
//     (simd times chunks may exceed the terms: trits beyond are 0); packing, trits in a byte (4 or 5);
//     row_bytes, bytes of the simd trits of one output; weight_t and step_words, type and number of the
//     memory words of a step (pe rows of row_bytes bytes, the first in the lowest bits); step_cycles.
#ifndef EDGEMAT_TERNARY_HPP
#define EDGEMAT_TERNARY_HPP

#include "edgemat/rounding.hpp"

namespace edgemat {

// Levels of a tree of N leaves: ceil(log2(N)).
template <int N>
struct tree_depth {
    static const int value = 1 + tree_depth<(N + 1) / 2>::value;
};
template <>
struct tree_depth<1> {
    static const int value = 0;
};

// The sum of N codes modulo 2**LIMIT: a tree of adders, each as wide as its sum, and never wider than LIMIT.
template <int N, int LIMIT, class T>
struct adder_tree {
    static const int exact = code_traits<typename code_traits<T>::widened>::width + tree_depth<N>::value;
    typedef ap_int<(exact < LIMIT ? exact : LIMIT)> type;
    static type of(const T* terms, int first) {
#pragma HLS INLINE
        const typename adder_tree<N / 2, LIMIT, T>::type low = adder_tree<N / 2, LIMIT, T>::of(terms, first);
        const typename adder_tree<N - N / 2, LIMIT, T>::type high =
            adder_tree<N - N / 2, LIMIT, T>::of(terms, first + N / 2);
        return type(low + high);
    }
};
template <int LIMIT, class T>
struct adder_tree<1, LIMIT, T> {
    typedef typename code_traits<T>::widened type;
    static type of(const T* terms, int first) { return type(terms[first]); }
};
template <int LIMIT, class T>
struct adder_tree<0, LIMIT, T> {
    typedef ap_int<1> type;
    static type of(const T*, int) { return type(0); }
};

#ifdef EDGEMAT_HARDWARE_TYPES
// COUNT outputs from FIRST on, halved down to one.
template <class C, int FIRST, int COUNT>
struct constant_rows {
    static void run(const typename C::x0_t* x, typename C::y_t* y, const typename C::bias_t* bias) {
#pragma HLS INLINE
        constant_rows<C, FIRST, COUNT / 2>::run(x, y, bias);
        constant_rows<C, FIRST + COUNT / 2, COUNT - COUNT / 2>::run(x, y, bias);
    }
};
template <class C, int O>
struct constant_rows<C, O, 1> {
    static const int first = C::first(O);
    static const int split = C::split(O);
    static const int added = split - first;
    static const int subtracted = C::first(O + 1) - split;
    static void run(const typename C::x0_t* x, typename C::y_t* y, const typename C::bias_t* bias) {
#pragma HLS INLINE
        const int width = code_traits<typename C::acc_t>::width;
        typename C::x0_t plus[added > 0 ? added : 1];
        typename C::x0_t minus[subtracted > 0 ? subtracted : 1];
#pragma HLS ARRAY_PARTITION variable = plus type = complete
#pragma HLS ARRAY_PARTITION variable = minus type = complete
        for (int i = 0; i < added; i++) {
#pragma HLS UNROLL
            plus[i] = x[C::tap(first + i)];
        }
        for (int i = 0; i < subtracted; i++) {
#pragma HLS UNROLL
            minus[i] = x[C::tap(split + i)];
        }
        typename C::acc_t sum = typename C::acc_t(bias[O]);
        if (added > 0) sum += adder_tree<added, width, typename C::x0_t>::of(plus, 0);
        if (subtracted > 0) sum -= adder_tree<subtracted, width, typename C::x0_t>::of(minus, 0);
        y[O] = finish<C>(sum, O);
    }
};
#endif

struct ternary_constants {
    template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS>
    static void dot(const typename C::x0_t* x, typename C::y_t* y, const typename C::bias_t* bias) {
#pragma HLS INLINE
#ifdef EDGEMAT_HARDWARE_TYPES
        constant_rows<C, 0, OUTPUTS>::run(x, y, bias);
#else
        // The same sums from a list, in native integers.
        decltype(operand(typename C::x0_t())) codes[DEPTH * GROUPS];
        for (int i = 0; i < DEPTH * GROUPS; i++) codes[i] = operand(x[i]);
        for (int o = 0; o < OUTPUTS; o++) {
            typename C::sum_t sum = bias[o];
            for (int i = C::first(o); i < C::split(o); i++) sum += codes[C::tap(i)];
            for (int i = C::split(o); i < C::first(o + 1); i++) sum -= codes[C::tap(i)];
            y[o] = finish<C>(typename C::acc_t(sum), o);
        }
#endif
    }
};

// Fields of two bits (0b01: +1, 0b11: -1, 0b00: 0) of the five trits of every byte; first trit lowest.
struct trit_table {
    unsigned short fields[256];
    constexpr trit_table() : fields() {
        // Bytes count up: digits to the base 3 (0, 1, 2 for -1, 0, +1), the first one fastest.
        int digit[5] = {0, 0, 0, 0, 0};
        for (int byte = 0; byte < 243; byte++) {
            int word = 0;
            for (int i = 4; i >= 0; i--) word = (word << 2) | (digit[i] == 0 ? 3 : digit[i] == 1 ? 0 : 1);
            fields[byte] = static_cast<unsigned short>(word);
            for (int i = 0; i < 5 && ++digit[i] == 3; i++) digit[i] = 0;
        }
    }
};

// The fields of two bits in a byte of PACKING trits.
template <int PACKING>
struct trit_byte {
    static unsigned fields(unsigned char byte) { return byte; }
};
template <>
struct trit_byte<5> {
    static unsigned fields(unsigned char byte) {
#pragma HLS INLINE
        static constexpr trit_table table = trit_table();
        return table.fields[byte];
    }
};

// Bytes of a memory word, the lowest first.
template <class W>
struct word_bytes {
    static const int count = 1;
    static void get(unsigned char word, unsigned char* bytes, int first) { bytes[first] = word; }
};
template <int N>
struct word_bytes<ap_uint<N> > {
    static const int count = N / 8;
    static void get(const ap_uint<N>& word, unsigned char* bytes, int first) {
#pragma HLS INLINE
        for (int low = 0; low < N; low += 64) {
#pragma HLS UNROLL
            const int size = N - low < 64 ? N - low : 64;
            const ap_uint<64> part = word.range(low + size - 1, low);
            const unsigned long long bits = part.to_uint64();
            for (int b = 0; b < size; b += 8) {
#pragma HLS UNROLL
                bytes[first + ((low + b) >> 3)] = static_cast<unsigned char>(bits >> b);
            }
        }
    }
};

// The terms of one step of one output: the input, its negative or nothing.
#ifdef EDGEMAT_HARDWARE_TYPES
template <class C>
struct trit_terms {
    typedef ap_int<code_traits<typename C::x0_t>::width + 1> term_t;
    term_t terms[C::simd];
    void take(int s, typename C::x0_t x, unsigned field) {
#pragma HLS INLINE
        const term_t code = x;
        terms[s] = (field & 1u) == 0 ? term_t(0) : (field & 2u) == 0 ? code : term_t(-code);
    }
    typename C::sum_t total() const {
#pragma HLS INLINE
        return adder_tree<C::simd, code_traits<typename C::acc_t>::width, term_t>::of(terms, 0);
    }
};
#else
template <class C>
struct trit_terms {
    typename C::sum_t sum;
    trit_terms() : sum(0) {}
    template <class X>
    void take(int, X x, unsigned field) {
        // In the sum's type, which holds the negative of the smallest code wherever a weight is -1.
        typedef typename C::sum_t sum_t;
        const sum_t code = static_cast<sum_t>(x), minus = static_cast<sum_t>(field >> 1);
        sum += ((code ^ -minus) + minus) & -static_cast<sum_t>(field & 1u);
    }
    typename C::sum_t total() const { return sum; }
};
#endif

// The row-wise unit: `pe` outputs and `simd` terms a step, weights from `words`.
// \tparam OUTPUTS, DEPTH  rows and columns of the weights
// \tparam CHANNELS, GROUPS  as for dot (dot.hpp)
template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS, class W>
void packed_dot(const typename C::x0_t* x, typename C::y_t* y, const W* words,
                const typename C::bias_t* bias) {
#pragma HLS INLINE
    const int group_channels = CHANNELS / GROUPS;
    const int group_outputs = OUTPUTS / GROUPS;
#ifdef EDGEMAT_HARDWARE_TYPES
    typedef typename C::x0_t code_t;
    const code_t* codes = x;
#else
    typedef decltype(operand(typename C::x0_t())) code_t;
    code_t codes[DEPTH * GROUPS];
    for (int i = 0; i < DEPTH * GROUPS; i++) codes[i] = operand(x[i]);
#endif
    typename C::sum_t partial[C::pe];
    unsigned char bytes[C::step_words * word_bytes<W>::count];
#pragma HLS ARRAY_PARTITION variable = partial type = complete
#pragma HLS ARRAY_PARTITION variable = bytes type = complete
    for (int block = 0; block < OUTPUTS / C::pe; block++) {
        for (int chunk = 0; chunk < C::chunks; chunk++) {
#pragma HLS PIPELINE II = C::step_cycles
            for (int i = 0; i < C::step_words; i++) {
#pragma HLS UNROLL
                word_bytes<W>::get(words[(block * C::chunks + chunk) * C::step_words + i], bytes,
                                   i * word_bytes<W>::count);
            }
            for (int p = 0; p < C::pe; p++) {
#pragma HLS UNROLL
                const int o = block * C::pe + p;
                const int offset = GROUPS == 1 ? 0 : (o / group_outputs) * group_channels;
                trit_terms<C> terms;
                for (int first = 0; first < C::simd; first += C::packing) {
#pragma HLS UNROLL
                    const unsigned fields =
                        trit_byte<C::packing>::fields(bytes[p * C::row_bytes + first / C::packing]);
                    for (int t = 0; t < C::packing && first + t < C::simd; t++) {
#pragma HLS UNROLL
                        const int k = chunk * C::simd + first + t;
                        const int tap =
                            GROUPS == 1 ? k : (k / group_channels) * CHANNELS + k % group_channels + offset;
                        // Trits beyond the last term are 0; their input is never read.
                        terms.take(first + t, k < DEPTH ? codes[tap] : code_t(0), (fields >> (t << 1)) & 3u);
                    }
                }
                partial[p] = (chunk == 0 ? typename C::sum_t(bias[o]) : partial[p]) + terms.total();
                if (chunk == C::chunks - 1) y[o] = finish<C>(typename C::acc_t(partial[p]), o);
            }
        }
    }
}

struct ternary_rom {
    template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS>
    static void dot(const typename C::x0_t* x, typename C::y_t* y, const typename C::weight_t* words,
                    const typename C::bias_t* bias) {
#pragma HLS INLINE
#pragma HLS ARRAY_RESHAPE variable = words type = cyclic factor = C::step_words
#pragma HLS BIND_STORAGE variable = words type = rom_1p
        packed_dot<C, OUTPUTS, DEPTH, CHANNELS, GROUPS>(x, y, words, bias);
    }
};

struct ternary_axi {
    template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS>
    static void dot(const typename C::x0_t* x, typename C::y_t* y, const typename C::weight_t* words,
                    const typename C::bias_t* bias) {
#pragma HLS INLINE
        packed_dot<C, OUTPUTS, DEPTH, CHANNELS, GROUPS>(x, y, words, bias);
    }
};

// UltraRAM of most devices has no initial contents, so the first call after a reset copies the words.
struct ternary_uram {
    template <class C, int OUTPUTS, int DEPTH, int CHANNELS, int GROUPS>
    static void dot(const typename C::x0_t* x, typename C::y_t* y, const typename C::weight_t* words,
                    const typename C::bias_t* bias) {
#pragma HLS INLINE
        const int count = OUTPUTS / C::pe * C::chunks * C::step_words;
        static typename C::weight_t memory[count];
        static bool loaded = false;
#pragma HLS BIND_STORAGE variable = memory type = ram_1p impl = uram
#pragma HLS RESET variable = loaded
        if (!loaded) {
            for (int i = 0; i < count; i++) {
#pragma HLS PIPELINE II = 1
                memory[i] = words[i];
            }
            loaded = true;
        }
        packed_dot<C, OUTPUTS, DEPTH, CHANNELS, GROUPS>(x, y, memory, bias);
    }
};

}  // namespace edgemat

#endif  // EDGEMAT_TERNARY_HPP
