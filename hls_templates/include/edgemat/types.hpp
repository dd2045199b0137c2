// SPDX-License-Identifier: Apache-2.0
// The element types every operator shares.
//
// A tensor element is an integer *code* held in ap_int<W> or ap_uint<W>; its binary point lives in the model,
// never in the type. Constants (weights, biases, tables) are ap_int codes in hardware. In C simulation they
// are the smallest native integer that holds them, so that large tables need no constructors, and sums run in
// a native integer that the model's range proof shows to be wide enough; two's complement makes the final
// conversion to the hardware accumulator identical to wrapping at every step. Define EDGEMAT_HARDWARE_TYPES
// to simulate with the hardware types instead.
#ifndef EDGEMAT_TYPES_HPP
#define EDGEMAT_TYPES_HPP

#include <ap_int.h>

#if defined(__SYNTHESIS__) && !defined(EDGEMAT_HARDWARE_TYPES)
#define EDGEMAT_HARDWARE_TYPES
#endif

namespace edgemat {

template <bool CONDITION, class A, class B>
struct select {
    typedef A type;
};
template <class A, class B>
struct select<false, A, B> {
    typedef B type;
};

template <class T>
struct code_traits;
template <int W>
struct code_traits<ap_int<W> > {
    static const int width = W;
    static const bool is_signed = true;
    // The narrowest signed code type that holds every value of this one.
    typedef ap_int<W> widened;
};
template <int W>
struct code_traits<ap_uint<W> > {
    static const int width = W;
    static const bool is_signed = false;
    typedef ap_int<W + 1> widened;
};

template <int W, bool SIGNED>
struct native {
    typedef typename select<
        (W <= 8), signed char,
        typename select<(W <= 16), short, typename select<(W <= 32), int, long long>::type>::type>::type type;
};
template <int W>
struct native<W, false> {
    typedef typename select<
        (W < 8), unsigned char,
        typename select<(W < 16), unsigned short,
                        typename select<(W <= 32), unsigned, unsigned long long>::type>::type>::type type;
};

#ifdef EDGEMAT_HARDWARE_TYPES
// A constant of W bits: the element type of weight, bias and table arrays.
template <int W, bool SIGNED>
struct constant {
    typedef typename select<SIGNED, ap_int<W>, ap_uint<W> >::type type;
};
// A signed intermediate of W bits.
template <int W>
struct carrier {
    typedef ap_int<W> type;
};
// The type a sum runs in: the accumulator itself.
template <class Accumulator, int PROVEN_WIDTH>
struct sum {
    typedef Accumulator type;
};
template <class T>
inline T operand(T code) {
    return code;
}
#else
template <int W, bool SIGNED>
struct constant {
    typedef typename native<W, SIGNED>::type type;
};
template <int W>
struct carrier {
    typedef typename select<(W <= 63), long long, ap_int<W> >::type type;
};
// PROVEN_WIDTH bits hold every partial sum in any order, so the native sum cannot overflow.
template <class Accumulator, int PROVEN_WIDTH>
struct sum {
    typedef typename select<(PROVEN_WIDTH <= 32), int, long long>::type type;
};
template <int W>
inline typename select<(W <= 32), int, long long>::type operand(ap_int<W> code) {
    return static_cast<typename select<(W <= 32), int, long long>::type>(code.to_int64());
}
template <int W>
inline typename select<(W <= 31), int, long long>::type operand(ap_uint<W> code) {
    return static_cast<typename select<(W <= 31), int, long long>::type>(code.to_int64());
}
inline int operand(signed char code) { return code; }
inline int operand(unsigned char code) { return code; }
inline int operand(short code) { return code; }
inline int operand(unsigned short code) { return code; }
inline int operand(int code) { return code; }
inline long long operand(unsigned code) { return code; }
inline long long operand(long long code) { return code; }
#endif

// How a sum of products is formed: multipliers; additions and subtractions, where every weight is -1 or +1;
// counts of equal signs, where every input is, too (weights of these two are stored as signs: 1 for -1);
// shifts and additions, where every weight is a sum of few signed powers of two (shift_add.hpp).
enum product_kind { MULTIPLY, ADD_SIGNED, COUNT_SIGNS, SHIFT_ADD };

// One beat of a stream: LANES neighbouring elements of the channels-last order.
template <class T, int LANES>
struct vec {
    typedef T element_t;
    static const int lanes = LANES;
    T data[LANES];
    T& operator[](int i) { return data[i]; }
    const T& operator[](int i) const { return data[i]; }
};

}  // namespace edgemat

#endif  // EDGEMAT_TYPES_HPP
