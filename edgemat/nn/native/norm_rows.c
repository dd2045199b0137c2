/* RMS norm and layer norm of training, with gain, bias and the quantiser behind them, in single passes over
 * float32 rows [rows][features] whose values times `scale` are integers (docs/normalization.md).
 *
 * Forward, every step is exact: the sums of a row and the integer reciprocal root of its total, then in float
 * or double, whichever holds them, the products that are rounded once into the format of the norm and once
 * into that of the quantiser. Backward is the real norm's, computed anew from the input; its sums are taken
 * in another order than torch's. */

#include "passes.h"

#define ALWAYS static inline __attribute__((always_inline))
#define TOTAL_LIMIT 0x1p62
#define ROWS 64 /* rows whose gradients are summed in float before they join those in double */

/* As edgemat/rounding.py and edgemat/fixed.py count them. */
enum { TRN, TRN_ZERO, RND, RND_ZERO, RND_INF, RND_MIN_INF, RND_CONV };
enum { WRAP, SAT, SAT_SYM, SAT_ZERO };
/* What holds the product with the mantissa, and that with the gain plus the bias. */
enum { FLOATS, DOUBLE_FLOAT, DOUBLES };

/* Mirrored in edgemat/nn/normalization_rows.py. `wide` and `features` say of what the vectors [features] are:
 * double for DOUBLES, else float. */
typedef struct {
    int64_t rows, features;
    int64_t block;   /* squares of codes that a float sums exactly; 0: a double sums a row's, -1: an int64 */
    int64_t largest; /* absolute code; looked at for an int64 only */
    int64_t offset;  /* what eps adds to the total of a row */
    int64_t root;    /* sqrt(k), 31 bits */
    int32_t threads, centred, shift, wide;
    int32_t common; /* both formats round half up and saturate, and doubles have a bit to spare */
    int32_t quantised, relu;
    int32_t norm_rounding, norm_overflow, rounding, overflow;
    double scale;
    double norm_low, norm_high, low, high, step;
} EdgematRows;

/* -- a row's scale ------------------------------------------------------------------- */

/* Adds the sum of `count` values and that of their squares; exact, so in any order: in four parts side by
 * side, none of which waits for another. */
#define ADD_SUMS(NAME, REAL)                                                                               \
    ALWAYS void NAME(const float* x, int64_t count, double* total, double* squares) {                      \
        const int64_t part = count / 4;                                                                    \
        REAL a = 0, b = 0, c = 0, d = 0, aa = 0, bb = 0, cc = 0, dd = 0;                                   \
        _Pragma("omp simd reduction(+ : a, b, c, d, aa, bb, cc, dd)") for (int64_t i = 0; i < part; i++) { \
            const REAL p = x[i], q = x[part + i], r = x[2 * part + i], s = x[3 * part + i];                \
            a += p, b += q, c += r, d += s;                                                                \
            aa += p * p, bb += q * q, cc += r * r, dd += s * s;                                            \
        }                                                                                                  \
        for (int64_t i = 4 * part; i < count; i++) {                                                       \
            a += x[i];                                                                                     \
            aa += (REAL)x[i] * x[i];                                                                       \
        }                                                                                                  \
        *total += (double)(a + b) + (double)(c + d);                                                       \
        *squares += (double)(aa + bb) + (double)(cc + dd);                                                 \
    }

ADD_SUMS(add_floats, float)
ADD_SUMS(add_doubles, double)

typedef struct {
    int64_t total; /* of squares, or features times that - sum**2; -1 where it is out of range */
    double centre; /* what is taken off features * x, or off x: the sum, or 0 */
} Sums;

static Sums sums_of(const EdgematRows* s, const float* x) {
    const int64_t n = s->features;
    const double most = TOTAL_LIMIT / (s->centred ? (double)n : 1.0);
    double sum = 0.0, squares = 0.0;
    int64_t whole = 0, square = 0;
    if (s->block > 0)
        for (int64_t i = 0; i < n; i += s->block)
            add_floats(x + i, n - i < s->block ? n - i : s->block, &sum, &squares);
    else if (s->block == 0)
        add_doubles(x, n, &sum, &squares);
    for (int64_t i = 0; i < n && s->block < 0; i++) {
        const double v = rint(x[i] * s->scale);
        const int64_t code = fabs(v) <= (double)s->largest ? (int64_t)v : 0;
        sum += x[i];
        squares += v == (double)code ? 0.0 : NAN;
        whole += code;
        square += code * code;
    }
    Sums found = {-1, s->centred ? sum * s->scale : 0.0};
    squares *= s->scale * s->scale;
    if (!(squares <= most)) return found;
    if (s->block >= 0) {
        whole = s->centred ? (int64_t)(sum * s->scale) : 0;
        square = (int64_t)squares;
    }
    found.total = s->centred ? n * square - whole * whole : square;
    return found;
}

/* sqrt(k / total) in LSBs of the norm's format. */
static double scale_of(const EdgematRows* s, int64_t found, const int64_t* table) {
    const int64_t with_eps = found < 0 ? 0 : found + s->offset;
    const uint64_t total = with_eps < 1 ? 1 : (uint64_t)with_eps;
    const int exponent = (65 - __builtin_clzll(total)) >> 1; /* 4**(exponent - 1) <= total < 4**exponent */
    const int shift = 30 - 2 * exponent;
    const uint64_t u = shift >= 0 ? total << shift : total >> -shift;
    const uint64_t a = (uint64_t)table[(u >> 22) - 64];
    const uint64_t t = (a * a * u) >> 30;
    const uint64_t b = (a * ((3ULL << 30) - t)) >> 16;
    const uint64_t product = b * (uint64_t)s->root;
    const int doubled = (int)(product >> 61);
    return ldexp((double)(product >> (45 + doubled)), doubled - exponent - s->shift);
}

/* -- forward ------------------------------------------------------------------------- */

ALWAYS double half_up_wide(double twice) { return ceil(floor(twice) * 0.5); }

ALWAYS double clamped_wide(double v, double low, double high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* Half of `twice`, rounded. */
static double rounded(double twice, int32_t mode) {
    switch (mode) {
        case TRN:
            return floor(twice * 0.5);
        case TRN_ZERO:
            return trunc(twice * 0.5);
        case RND_ZERO:
            return copysign(floor(ceil(fabs(twice)) * 0.5), twice);
        case RND_INF:
            return copysign(ceil(floor(fabs(twice)) * 0.5), twice);
        case RND_MIN_INF:
            return floor(ceil(twice) * 0.5);
        case RND_CONV:
            return rint(twice * 0.5);
        default:
            return half_up_wide(twice);
    }
}

/* An integer brought between `low` and `high`. */
static double overflowed(double code, double low, double high, int32_t mode) {
    if (mode == SAT_ZERO) return code < low || code > high ? 0.0 : code;
    if (mode != WRAP) return clamped_wide(code, low, high);
    const double codes = high - low + 1.0;
    return code - floor((code - low) / codes) * codes;
}

/* Gain and bias are in half LSBs of the quantiser, or where there is none in units of the result; `common`
 * promises that one half more than a product with the mantissa is exact, too. */
ALWAYS void row_forward(const EdgematRows* s, int wide, int quantised, float* y, const float* x,
                        const void* gain, const void* bias, double centre, double scale) {
    const EdgematRows k = *s;
    const double factor = k.scale * (k.centred ? (double)k.features : 1.0) * scale,
                 less = centre * scale - 0.5;
    if (wide == DOUBLES) {
        const double *g = gain, *b = bias;
#pragma omp simd
        for (int64_t i = 0; i < k.features; i++) {
            const double z = clamped_wide(floor(x[i] * factor - less), k.norm_low, k.norm_high);
            const double t = z * g[i] + b[i];
            y[i] = (float)(quantised ? clamped_wide(half_up_wide(t), k.low, k.high) * k.step : t);
        }
        return;
    }
    const float *g = gain, *b = bias;
    const float low = (float)k.low, high = (float)k.high, step = (float)k.step;
    const float norm_low = (float)k.norm_low, norm_high = (float)k.norm_high, narrow = (float)factor;
#pragma omp simd
    for (int64_t i = 0; i < k.features; i++) {
        /* FLOATS are not centred. */
        const float z = wide == FLOATS ? floorf(x[i] * narrow + 0.5f) : (float)floor(x[i] * factor - less);
        const float t = clamped(z, norm_low, norm_high) * g[i] + b[i];
        y[i] = quantised ? clamped(half_up(t), low, high) * step : t;
    }
}

/* The same in every mode. */
static void row_forward_any(const EdgematRows* s, float* y, const float* x, const double* gain,
                            const double* bias, double centre, double scale) {
    const double times = s->scale * (s->centred ? (double)s->features : 1.0);
    for (int64_t i = 0; i < s->features; i++) {
        const double code = rounded((x[i] * times - centre) * scale * 2.0, s->norm_rounding);
        double t = overflowed(code, s->norm_low, s->norm_high, s->norm_overflow) * gain[i] + bias[i];
        if (s->quantised) {
            t = s->relu && t < 0.0 ? 0.0 : t;
            t = overflowed(rounded(t, s->rounding), s->low, s->high, s->overflow) * s->step;
        }
        y[i] = (float)t;
    }
}

#define WITH(WIDE, QUANTISED)                                                             \
    case (WIDE) * 2 + (QUANTISED):                                                        \
        row_forward(s, WIDE, QUANTISED, y + at, x + at, gain, bias, found.centre, scale); \
        break

/* Values; `table` as in edgemat/ops/reciprocal_root.py. */
void edgemat_rows_forward(const EdgematRows* s, float* y, const float* x, const void* gain, const void* bias,
                          const int64_t* table) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t row = 0; row < s->rows; row++) {
        const int64_t at = row * s->features;
        const Sums found = sums_of(s, x + at);
        const double scale = scale_of(s, found.total, table);
        switch (s->common ? s->wide * 2 + s->quantised : -1) {
            WITH(FLOATS, 0);
            WITH(FLOATS, 1);
            WITH(DOUBLE_FLOAT, 0);
            WITH(DOUBLE_FLOAT, 1);
            WITH(DOUBLES, 0);
            WITH(DOUBLES, 1);
            default:
                row_forward_any(s, y + at, x + at, gain, bias, found.centre, scale);
        }
    }
}

/* -- backward ------------------------------------------------------------------------ */

/* One row: the gradient of x, and what it adds to those of gain and bias and (`point`) of the quantiser's
 * binary point, which is returned. Outside of low..high the quantiser passes no gradient. */
ALWAYS double row_backward(int64_t n, int centred, int point, float* dx, float* dgain, float* dbias,
                           const float* g, const float* x, const float* y, const float* gain,
                           const float* bias, float mean, float rstd, float low, float high) {
    float along = 0.0f, plain = 0.0f, points = 0.0f;
#pragma omp simd reduction(+ : along, plain, points)
    for (int64_t i = 0; i < n; i++) {
        const float normal = (x[i] - mean) * rstd, result = normal * gain[i] + bias[i];
        const float inside = masked(g[i], result, low, high), scaled = inside * gain[i];
        dgain[i] += inside * normal;
        dbias[i] += inside;
        along += scaled * normal;
        if (centred) plain += scaled;
        if (point) points += inside * result - g[i] * y[i];
        dx[i] = scaled;
    }
    const float slope = along / (float)n * rstd * rstd, level = plain / (float)n * rstd;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dx[i] = dx[i] * rstd - level - (x[i] - mean) * slope;
    return points;
}

static double rows_backward(const EdgematRows* s, float* dx, float* part, const float* g, const float* x,
                            const float* y, const float* gain, const float* bias, double eps, float low,
                            float high, int64_t rows) {
    const int64_t n = s->features;
    double points = 0.0;
    for (int64_t row = 0; row < rows; row++, dx += n, g += n, x += n) {
        const Sums found = sums_of(s, x);
        const double count = (double)n, variance = (double)found.total / (s->scale * s->scale * count);
        const double power = s->centred ? variance / count : variance;
        const float rstd = (float)(1.0 / sqrt((found.total < 0 ? (double)NAN : power) + eps));
        const float mean = (float)(found.centre / (s->scale * count));
        if (s->centred && y)
            points += row_backward(n, 1, 1, dx, part, part + n, g, x, y, gain, bias, mean, rstd, low, high);
        else if (s->centred)
            points += row_backward(n, 1, 0, dx, part, part + n, g, x, y, gain, bias, mean, rstd, low, high);
        else if (y)
            points += row_backward(n, 0, 1, dx, part, part + n, g, x, y, gain, bias, 0.0f, rstd, low, high);
        else
            points += row_backward(n, 0, 0, dx, part, part + n, g, x, y, gain, bias, 0.0f, rstd, low, high);
        if (y) y += n;
    }
    return points;
}

/* Gradients of x, and in `found` those of gain and bias and what the quantiser's binary point gets (where `y`
 * is given). `room` holds threads * features * 2 doubles and as many floats. */
void edgemat_rows_backward(const EdgematRows* s, float* dx, float* found, const float* g, const float* x,
                           const float* y, const float* gain, const float* bias, double eps, double low,
                           double high, double* room) {
    const int64_t n = s->features, both = 2 * n;
    float* parts = (float*)(room + s->threads * both);
    double points = 0.0;
    for (int64_t i = 0; i < s->threads * both; i++) room[i] = 0.0;
#pragma omp parallel num_threads(s->threads) reduction(+ : points)
    {
        const int64_t thread = this_thread();
        double* own = room + thread * both;
        float* part = parts + thread * both;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->rows; row += ROWS) {
            const int64_t at = row * n, rows = s->rows - row < ROWS ? s->rows - row : ROWS;
            for (int64_t i = 0; i < both; i++) part[i] = 0.0f;
            points += rows_backward(s, dx + at, part, g + at, x + at, y ? y + at : y, gain, bias, eps,
                                    (float)low, (float)high, rows);
            for (int64_t i = 0; i < both; i++) own[i] += part[i];
        }
    }
    for (int64_t i = 0; i < both; i++) {
        double sum = 0.0;
        for (int64_t thread = 0; thread < s->threads; thread++) sum += room[thread * both + i];
        found[i] = (float)sum;
    }
    found[both] = (float)(LN2 * points);
}
