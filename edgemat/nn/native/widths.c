/* Rounding weights to groups of learned width, as `LearnedWidthQuantizer._round` does, to the bit.
 *
 * Weights lie in `rows` rows of `size`, one row for each channel with a binary point of its own; every `per`
 * weights of a row share a learned binary point, `groups` to a row. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "passes.h"

#define POINT_LIMIT 80
#define NO_CODE 62

static float power_of_two(int exponent) {
    union {
        uint32_t bits;
        float value;
    } made;
    made.bits = (uint32_t)(exponent + 127) << 23;
    return made.value;
}

/* Exponent of the power of two above `top`, 0 for 0: the exponent of frexp. */
static int magnitude(float top) {
    int exponent = 0;
    if (top > 0.0f) {
        (void)frexpf(top, &exponent);
    }
    return exponent;
}

static int ceiling_of(float top, int width) {
    int found = width - 1 - magnitude(top);
    found = found < -POINT_LIMIT ? -POINT_LIMIT : found;
    return found > POINT_LIMIT ? POINT_LIMIT : found;
}

/* Rounds a row; gives the largest magnitude of the result. */
static float round_row(float* values, const float* w, const float* frac, int64_t size, int64_t per,
                       int ceiling) {
    float top = 0.0f;
    for (int64_t start = 0; start < size; start += per) {
        float wanted = rintf(frac[start / per]);
        wanted = wanted < -EXPONENT_LIMIT ? -EXPONENT_LIMIT : wanted;
        const int point = wanted < (float)ceiling ? (int)wanted : ceiling;
        const float twice = power_of_two(point + 1), step = power_of_two(-point);
        const int64_t end = start + per < size ? start + per : size;
        for (int64_t i = start; i < end; ++i) {
            values[i] = half_up(w[i] * twice) * step;
            const float size_of = fabsf(values[i]);
            top = size_of > top ? size_of : top;
        }
    }
    return top;
}

/* Codes of a row on the grid of `ceiling`, the bits each encloses; gives the zeros below the lowest one. */
static int encode_row(int64_t* codes, float* bits, const float* values, int64_t size, int ceiling) {
    const double scale = ldexp(1.0, ceiling);
    uint64_t all = 0;
    for (int64_t i = 0; i < size; ++i) {
        codes[i] = (int64_t)((double)values[i] * scale);
        const uint64_t left = (uint64_t)(codes[i] < 0 ? -codes[i] : codes[i]);
        all |= left;
        bits[i] = left == 0 ? 0.0f : (float)(64 - __builtin_clzll(left) - __builtin_ctzll(left));
    }
    return all == 0 ? NO_CODE : __builtin_ctzll(all);
}

/* Writes values, codes on each row's finest grid allowed, enclosed bits, `points` of each row and `span`, the
 * bits of the widest deployed code; while training, `frac` is kept where it acts. `both` says whether the
 * lowest two's complement code may not be used (SAT_SYM). Gives 0, or 1 where a weight is not finite. */
int edgemat_round_groups(float* values, int64_t* codes, float* bits, int32_t* points, int32_t* span,
                         float* frac, const float* weights, int64_t rows, int64_t size, int64_t per,
                         int64_t groups, int width, int training, int both) {
    int64_t highest = 0;
    int finest = -POINT_LIMIT, alive = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* w = weights + r * size;
        float *row_frac = frac + r * groups, *v = values + r * size;
        float top = 0.0f;
        for (int64_t i = 0; i < size; ++i) {
            const float size_of = fabsf(w[i]);
            if (!(size_of <= FLT_MAX)) {
                return 1;
            }
            top = size_of > top ? size_of : top;
        }
        int ceiling = ceiling_of(top, width);
        if (training) {
            const float low = (float)(ceiling - width - 1), high = (float)ceiling;
            for (int64_t g = 0; g < groups; ++g) {
                row_frac[g] = clamped(row_frac[g], low, high);
            }
        }
        const int grown = ceiling_of(round_row(v, w, row_frac, size, per, ceiling), width);
        if (grown < ceiling) { /* rounding up reached the next power of two */
            ceiling = grown;
            (void)round_row(v, w, row_frac, size, per, ceiling);
        }
        int64_t* row_codes = codes + r * size;
        const int spare = encode_row(row_codes, bits + r * size, v, size, ceiling);
        points[r] = ceiling - spare;
        if (spare == NO_CODE) {
            points[r] = INT32_MIN;
            continue;
        }
        alive = 1;
        finest = points[r] > finest ? points[r] : finest;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t code = row_codes[i] / ((int64_t)1 << spare);
            const int64_t held = code >= 0 ? code : -code - !both;
            highest = held > highest ? held : highest;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        points[r] = points[r] == INT32_MIN ? (alive ? finest : 0) : points[r];
    }
    *span = (highest > 0 ? 64 - __builtin_clzll((uint64_t)highest) : 0) + 1;
    return 0;
}

/* Activations of learned width: `x` holds `batch` times `channels` times `size` values; the constants have
 * one entry for each channel. y = clamp(round(x * 2**f) * 2**-f, low, high). */
void edgemat_saturate(float* y, const float* x, const float* doubled, const float* step, const float* low,
                      const float* high, int64_t batch, int64_t channels, int64_t size, int threads) {
    const int64_t blocks = batch * channels;
#pragma omp parallel for num_threads(threads) if (blocks * size > SMALL)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t c = block % channels;
        const float twice = doubled[c], back = step[c], bottom = low[c], top = high[c];
        const float* from = x + block * size;
        float* to = y + block * size;
        for (int64_t i = 0; i < size; ++i) {
            to[i] = clamped(half_up(from[i] * twice) * back, bottom, top);
        }
    }
}

/* The gradient of x, and of each channel's fractional and integer bits. Where `floored`, values of at most 0
 * have become 0 and bring nothing. */
void edgemat_saturate_backward(float* dx, float* df, float* dw, const float* g, const float* x,
                               const float* y, const float* step, const float* low, const float* high,
                               const float* peak, int64_t batch, int64_t channels, int64_t size, int floored,
                               int threads) {
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL)
    for (int64_t c = 0; c < channels; ++c) {
        const float half = step[c] * 0.5f, bottom = low[c], top = high[c];
        double inside = 0.0, over = 0.0, under = 0.0;
        for (int64_t n = 0; n < batch; ++n) {
            const int64_t at = (n * channels + c) * size;
            float errors = 0.0f, aboves = 0.0f, belows = 0.0f;
            for (int64_t i = at; i < at + size; ++i) {
                const float error = x[i] - y[i];
                const int above = (y[i] == top) & (error >= half);
                const int below = (y[i] == bottom) & (floored ? x[i] <= 0.0f : error < -half);
                const float passed = above | below ? 0.0f : g[i];
                dx[i] = passed;
                errors += passed * error;
                aboves += above ? g[i] : 0.0f;
                belows += below ? g[i] : 0.0f;
            }
            inside += errors;
            over += aboves;
            under += belows;
        }
        df[c] = (float)(LN2 * (inside + over * step[c]));
        dw[c] = (float)(LN2 * peak[c] * (floored ? over : over - under));
    }
}
