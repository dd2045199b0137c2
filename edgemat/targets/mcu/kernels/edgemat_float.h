/* Real values to codes and back, exactly as the Python reference: no libm, no dependence on the FPU's modes.
 *
 * A finite float32 is m * 2**e with |m| < 2**24; its code is overflow(round(m * 2**(e + frac))), which is the
 * requantisation of the integer m by the right shift -(e + frac). Shifts are limited to -63 .. 62: beyond 62
 * the value is below half an LSB, beyond -63 every bit has left the code (WRAP) or it is past the rail (SAT).
 */
#ifndef EDGEMAT_FLOAT_H
#define EDGEMAT_FLOAT_H

#include <string.h>

#include "edgemat_requantize.h"

/* How an input is quantised, or an output dequantised: element i has frac[i % channels] fractional bits and
 * codes y_min .. y_max [i % channels] (one entry for all where rail_step is 0, else rail_step is 1). */
typedef struct em_real_format {
    const int16_t* frac;
    const int64_t *y_min, *y_max;
    int32_t size, channels, rail_step;
} em_real_format;

EM_INLINE em_status em_quantize_f32(float value, int32_t channel, const em_real_format* f, int rounding,
                                    int overflow, int64_t* code) {
    const int frac = f->frac[channel];
    const int64_t y_min = f->y_min[channel * f->rail_step];
    const int64_t y_max = f->y_max[channel * f->rail_step];
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const int exponent = (int)((bits >> 23) & 0xFFu);
    const int64_t fraction = (int64_t)(bits & 0x7FFFFFu);
    const int negative = (bits >> 31) != 0;
    if (exponent == 255) {
        if (fraction != 0) {
            return EM_ERROR_NAN;
        }
        if (overflow == EM_WRAP) {
            return EM_ERROR_RANGE;
        }
        *code = overflow == EM_SAT_ZERO ? 0 : negative ? y_min : y_max;
        return EM_OK;
    }
    const int64_t magnitude = exponent == 0 ? fraction : fraction + 0x800000;
    const int64_t m = negative ? -magnitude : magnitude;
    int shift = -((exponent == 0 ? 1 : exponent) - 150 + frac);
    shift = shift > 62 ? 62 : shift < -63 ? -63 : shift;
    *code = m == 0 && overflow != EM_SIGN
                ? 0
                : em_requantize_s64(m, shift, y_min, y_max, EM_SHIFT_ANY, rounding, overflow, 0);
    return EM_OK;
}

/* The code of value / scale, divided in float32, then rounded half to even and clipped to y_min .. y_max:
 * what ONNX's QuantizeLinear does, in integers. scale is positive and normal. The quotient of two
 * significands of 24 bits is cut behind 25 or 26 bits and rounded to 24; it is never a tie there, as a tie
 * times the divisor would take more than 24 bits. Below float32's normal range and beyond its end, every
 * rounding gives the same code. */
EM_INLINE em_status em_quantize_scaled_f32(float value, float scale, const em_real_format* f, int64_t* code) {
    uint32_t bits, unit;
    memcpy(&bits, &value, sizeof bits);
    memcpy(&unit, &scale, sizeof unit);
    int exponent = (int)((bits >> 23) & 0xFFu);
    uint32_t m = bits & 0x7FFFFFu;
    const int negative = (bits >> 31) != 0;
    if (exponent == 255) {
        *code = negative ? f->y_min[0] : f->y_max[0];
        return m != 0 ? EM_ERROR_NAN : EM_OK;
    }
    if (exponent == 0 && m == 0) {
        *code = em_requantize_s64(0, 0, f->y_min[0], f->y_max[0], EM_SHIFT_NONE, EM_TRN, EM_SAT, 0);
        return EM_OK;
    }
    m |= exponent == 0 ? 0u : 0x800000u;
    exponent = exponent == 0 ? 1 : exponent;
    while (m < 0x800000u) {
        m <<= 1;
        --exponent;
    }
    const uint32_t divisor = (unit & 0x7FFFFFu) | 0x800000u;
    const uint64_t q = ((uint64_t)m << 25) / divisor;
    const int drop = q >> 25 != 0 ? 2 : 1;
    const int64_t rounded = (int64_t)((q + ((uint64_t)1 << (drop - 1))) >> drop);
    int shift = 25 - drop - (exponent - (int)((unit >> 23) & 0xFFu));
    shift = shift > 62 ? 62 : shift < -63 ? -63 : shift;
    *code = em_requantize_s64(negative ? -rounded : rounded, shift, f->y_min[0], f->y_max[0], EM_SHIFT_ANY,
                              EM_RND_CONV, EM_SAT, 0);
    return EM_OK;
}

/* code * 2**-frac; exact for codes of at most 53 bits. */
EM_INLINE double em_dequantize_f64(int64_t code, int frac) {
    const uint64_t bits = (uint64_t)(1023 - frac) << 52;
    double unit;
    memcpy(&unit, &bits, sizeof unit);
    return (double)code * unit;
}

#endif /* EDGEMAT_FLOAT_H */
