// SPDX-License-Identifier: Apache-2.0
// Host side: real values to codes and back. Not for synthesis.
#ifndef EDGEMAT_BOUNDARY_HPP
#define EDGEMAT_BOUNDARY_HPP

#include <cmath>

#include "edgemat/rounding.hpp"

namespace edgemat {

// code = overflow(round(value * 2**frac_bits)); false where there is none: NaN, or an infinity under WRAP.
// Scaling a float32 by a power of two is exact in a double. `bits` is the width of the code's channel; that
// of T under WRAP.
template <int ROUNDING, int OVERFLOW, class T>
bool quantize_code(float value, int frac_bits, T& code, int bits = code_traits<T>::width) {
    if (std::isnan(value) || (OVERFLOW == WRAP && std::isinf(value))) return false;
    if (OVERFLOW == SIGN || bits == 0) {
        code = T(bits == 0 ? 0 : value < 0.0F ? -1 : 1);
        return true;
    }
    const double scaled = std::ldexp(static_cast<double>(value), frac_bits);
    double rounded = scaled;
    if (!std::isinf(scaled)) {
        const double floor_code = std::floor(scaled);
        const double fraction = scaled - floor_code;
        const bool odd = std::fmod(floor_code, 2.0) != 0.0;
        const bool rest = fraction != 0.0 && fraction != 0.5;
        rounded = floor_code + (rounds_up<ROUNDING>(scaled < 0.0, fraction >= 0.5, rest, odd) ? 1.0 : 0.0);
    }
    typedef code_traits<T> traits;
    const int magnitude = traits::is_signed ? bits - 1 : bits;
    const double above = std::ldexp(1.0, magnitude);
    const double low = !traits::is_signed ? 0.0 : OVERFLOW == SAT_SYM ? 1.0 - above : -above;
    if (OVERFLOW == WRAP) {
        const double modulus = std::ldexp(1.0, traits::width);
        double rest = std::fmod(rounded, modulus);
        if (rest < 0.0) rest += modulus;
        code = T(ap_uint<traits::width>(static_cast<unsigned long long>(rest)));
        return true;
    }
    const bool over = rounded >= above;
    const bool under = rounded < low;
    if (OVERFLOW == SAT_ZERO && (over || under)) {
        code = 0;
    } else if (over) {
        code = T((ap_int<traits::width + 2>(1) << magnitude) - 1);
    } else if (under) {
        const ap_int<traits::width + 2> lowest = -(ap_int<traits::width + 2>(1) << magnitude);
        code = traits::is_signed ? T(OVERFLOW == SAT_SYM ? ap_int<traits::width + 2>(lowest + 1) : lowest)
                                 : T(0);
    } else {
        code = T(static_cast<long long>(rounded));
    }
    return true;
}

// code = clip(round_half_even(value / scale), low, high), divided in float32 as ONNX's QuantizeLinear does.
template <class T>
bool quantize_scaled(const float* values, T* codes, int size, float scale, int low, int high) {
    bool all = true;
    for (int i = 0; i < size; i++) {
        const float ratio = values[i] / scale;
        const float clipped = ratio < static_cast<float>(low)    ? static_cast<float>(low)
                              : ratio > static_cast<float>(high) ? static_cast<float>(high)
                                                                 : ratio;
        ap_int<32> code = 0;
        all = quantize_code<RND_CONV, SAT>(clipped, 0, code) && all;
        codes[i] = T(code);
    }
    return all;
}

template <class T>
void dequantize_scaled(const T* codes, double* values, int size, float scale) {
    for (int i = 0; i < size; i++) {
        const float value = static_cast<float>(codes[i].to_int64()) * scale;
        values[i] = static_cast<double>(value);
    }
}

// Channels last: element i has the binary point i % frac_count, and so the width where `widths` is given.
template <int ROUNDING, int OVERFLOW, class T>
bool quantize_codes(const float* values, T* codes, int size, const int* frac_bits, int frac_count,
                    const int* widths = 0) {
    bool all = true;
    for (int i = 0; i < size; i++) {
        const int channel = i % frac_count;
        const int bits = widths ? widths[channel] : static_cast<int>(code_traits<T>::width);
        all = quantize_code<ROUNDING, OVERFLOW>(values[i], frac_bits[channel], codes[i], bits) && all;
    }
    return all;
}

template <class T>
void dequantize_codes(const T* codes, double* values, int size, const int* frac_bits, int frac_count) {
    for (int i = 0; i < size; i++) {
        values[i] = std::ldexp(static_cast<double>(codes[i].to_int64()), -frac_bits[i % frac_count]);
    }
}

}  // namespace edgemat

#endif  // EDGEMAT_BOUNDARY_HPP
