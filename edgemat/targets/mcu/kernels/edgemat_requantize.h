/* Exact requantisation of an integer accumulator: code = overflow(round(accumulator * 2**-shift)).
 *
 * With q = floor(a / 2**s), r = a - q * 2**s and half = 2**(s-1), every rounding mode is q plus 0 or 1,
 * decided by comparing r with half (and by the sign of a, or the parity of q, on ties). Nothing here can
 * overflow: q + 1 is formed only where s >= 1, so |q| <= max / 2; a left shift is preceded by the comparison
 * with the code range.
 *
 * With headroom, a + half is known not to overflow, which makes EM_RND two instructions.
 *
 * Modes are arguments, but always literals in the kernels: the switches fold away once inlined.
 */
#ifndef EDGEMAT_REQUANTIZE_H
#define EDGEMAT_REQUANTIZE_H

#include "edgemat_kernels.h"

/* Rounding modes; the values at -2.5 -1.5 -0.5 0.5 1.5 2.5 stand beside them. */
#define EM_TRN 0         /* -3 -2 -1 0 1 2: floor */
#define EM_TRN_ZERO 1    /* -2 -1  0 0 1 2 */
#define EM_RND 2         /* -2 -1  0 1 2 3: half toward +inf */
#define EM_RND_ZERO 3    /* -2 -1  0 0 1 2: half toward zero */
#define EM_RND_INF 4     /* -3 -2 -1 1 2 3: half away from zero */
#define EM_RND_MIN_INF 5 /* -3 -2 -1 0 1 2: half toward -inf */
#define EM_RND_CONV 6    /* -2 -2  0 0 2 2: half to even */

/* Overflow modes. SAT_SYM is EM_SAT with y_min = -y_max. EM_FITS: proven to be inside the range. */
#define EM_FITS 0
#define EM_WRAP 1
#define EM_SAT 2
#define EM_SAT_ZERO 3
#define EM_SIGN 4 /* -1 below 0, else 1: bipolar codes; nothing is shifted */

/* The code range of a channel of w bits, where channels have widths of their own; of 0 bits: 0 alone. */
#define EM_RAILS_UNSIGNED 0  /* 0 .. 2**w - 1 */
#define EM_RAILS_SIGNED 1    /* -2**(w-1) .. 2**(w-1) - 1 */
#define EM_RAILS_SYMMETRIC 2 /* 1 - 2**(w-1) .. 2**(w-1) - 1 */

/* What the variant knows about its shifts. */
#define EM_SHIFT_NONE 0  /* all zero */
#define EM_SHIFT_RIGHT 1 /* all in 1 .. width of the accumulator - 2 */
#define EM_SHIFT_ANY 2   /* any sign; right shifts at most width - 2, left shifts at most width - 1 */

#define EM_DEFINE_REQUANTIZE(BITS)                                                                           \
    EM_INLINE int##BITS##_t em_round_s##BITS(int##BITS##_t a, int shift, int rounding, int headroom) {       \
        const int##BITS##_t q = a >> shift;                                                                  \
        const uint##BITS##_t mask = ((uint##BITS##_t)1 << shift) - 1u;                                       \
        const uint##BITS##_t half = (uint##BITS##_t)1 << (shift - 1);                                        \
        const uint##BITS##_t r = (uint##BITS##_t)a & mask;                                                   \
        switch (rounding) {                                                                                  \
            case EM_TRN:                                                                                     \
                return q;                                                                                    \
            case EM_TRN_ZERO:                                                                                \
                return q + (a < 0 && r != 0);                                                                \
            case EM_RND:                                                                                     \
                return headroom ? (a + (int##BITS##_t)half) >> shift : q + ((a >> (shift - 1)) & 1);         \
            case EM_RND_ZERO:                                                                                \
                return q + (a < 0 ? r >= half : r > half);                                                   \
            case EM_RND_INF:                                                                                 \
                return q + (a < 0 ? r > half : r >= half);                                                   \
            case EM_RND_MIN_INF:                                                                             \
                return q + (r > half);                                                                       \
            default:                                                                                         \
                return q + (r > half || (r == half && (q & 1) != 0));                                        \
        }                                                                                                    \
    }                                                                                                        \
                                                                                                             \
    EM_INLINE int##BITS##_t em_overflow_s##BITS(int##BITS##_t v, int##BITS##_t y_min, int##BITS##_t y_max,   \
                                                int overflow) {                                              \
        switch (overflow) {                                                                                  \
            case EM_FITS:                                                                                    \
                return v;                                                                                    \
            case EM_WRAP: {                                                                                  \
                const uint##BITS##_t mask = (uint##BITS##_t)y_max - (uint##BITS##_t)y_min;                   \
                const uint##BITS##_t low = ((uint##BITS##_t)v - (uint##BITS##_t)y_min) & mask;               \
                return (int##BITS##_t)(low + (uint##BITS##_t)y_min);                                         \
            }                                                                                                \
            case EM_SAT:                                                                                     \
                v = v < y_min ? y_min : v;                                                                   \
                return v > y_max ? y_max : v;                                                                \
            case EM_SIGN:                                                                                    \
                return v < 0 ? -1 : 1;                                                                       \
            default:                                                                                         \
                return v < y_min || v > y_max ? 0 : v;                                                       \
        }                                                                                                    \
    }                                                                                                        \
                                                                                                             \
    EM_INLINE int##BITS##_t em_rail_max_s##BITS(int width, int rails) {                                      \
        const int bits = width - (rails != EM_RAILS_UNSIGNED);                                               \
        return width == 0 ? 0 : (int##BITS##_t)(((uint##BITS##_t)1 << bits) - 1u);                           \
    }                                                                                                        \
                                                                                                             \
    EM_INLINE int##BITS##_t em_rail_min_s##BITS(int width, int rails) {                                      \
        if (rails == EM_RAILS_UNSIGNED || width == 0) {                                                      \
            return 0;                                                                                        \
        }                                                                                                    \
        return (int##BITS##_t)(-em_rail_max_s##BITS(width, rails) - (rails == EM_RAILS_SIGNED));             \
    }                                                                                                        \
                                                                                                             \
    EM_INLINE int##BITS##_t em_shift_left_s##BITS(int##BITS##_t a, int shift) {                              \
        return (int##BITS##_t)((uint##BITS##_t)a << shift);                                                  \
    }                                                                                                        \
                                                                                                             \
    /* a * 2**left, then overflow; the product itself need not fit. */                                       \
    EM_INLINE int##BITS##_t em_widen_s##BITS(int##BITS##_t a, int left, int##BITS##_t y_min,                 \
                                             int##BITS##_t y_max, int overflow) {                            \
        if (overflow == EM_SIGN) {                                                                           \
            return em_overflow_s##BITS(a, y_min, y_max, overflow);                                           \
        }                                                                                                    \
        if (overflow == EM_SAT || overflow == EM_SAT_ZERO) {                                                 \
            if (a > (y_max >> left)) {                                                                       \
                return overflow == EM_SAT ? y_max : 0;                                                       \
            }                                                                                                \
            if (a < (y_min >> left)) {                                                                       \
                return overflow == EM_SAT ? y_min : 0;                                                       \
            }                                                                                                \
        }                                                                                                    \
        return em_overflow_s##BITS(em_shift_left_s##BITS(a, left), y_min, y_max, overflow);                  \
    }                                                                                                        \
                                                                                                             \
    EM_INLINE int##BITS##_t em_requantize_s##BITS(int##BITS##_t a, int shift, int##BITS##_t y_min,           \
                                                  int##BITS##_t y_max, int kind, int rounding, int overflow, \
                                                  int headroom) {                                            \
        if (kind == EM_SHIFT_NONE) {                                                                         \
            return em_overflow_s##BITS(a, y_min, y_max, overflow);                                           \
        }                                                                                                    \
        if (kind == EM_SHIFT_RIGHT || shift > 0) {                                                           \
            return em_overflow_s##BITS(em_round_s##BITS(a, shift, rounding, headroom), y_min, y_max,         \
                                       overflow);                                                            \
        }                                                                                                    \
        return em_widen_s##BITS(a, -shift, y_min, y_max, overflow);                                          \
    }                                                                                                        \
                                                                                                             \
    /* round(a / n) for n >= 1, |a| and n below a quarter of the range, then overflow. */                    \
    EM_INLINE int##BITS##_t em_divide_s##BITS(int##BITS##_t a, int##BITS##_t n, int rounding) {              \
        int##BITS##_t q = a / n;                                                                             \
        int##BITS##_t r = a - q * n;                                                                         \
        if (r < 0) {                                                                                         \
            r += n;                                                                                          \
            q -= 1;                                                                                          \
        }                                                                                                    \
        const int##BITS##_t rest = n - r; /* r against rest is 2r against n */                               \
        switch (rounding) {                                                                                  \
            case EM_TRN:                                                                                     \
                return q;                                                                                    \
            case EM_TRN_ZERO:                                                                                \
                return q + (a < 0 && r != 0);                                                                \
            case EM_RND:                                                                                     \
                return q + (r >= rest);                                                                      \
            case EM_RND_ZERO:                                                                                \
                return q + (a < 0 ? r >= rest : r > rest);                                                   \
            case EM_RND_INF:                                                                                 \
                return q + (a < 0 ? r > rest : r >= rest);                                                   \
            case EM_RND_MIN_INF:                                                                             \
                return q + (r > rest);                                                                       \
            default:                                                                                         \
                return q + (r > rest || (r == rest && (q & 1) != 0));                                        \
        }                                                                                                    \
    }

EM_DEFINE_REQUANTIZE(32)
EM_DEFINE_REQUANTIZE(64)

#endif /* EDGEMAT_REQUANTIZE_H */
