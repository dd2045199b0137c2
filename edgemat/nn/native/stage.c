/* A layer's sums through everything up to the next layer, in single passes over float32 maps: rounded, made
 * an affine of the statistics of the batch, rounded, and rounded once more behind a ReLU. Backwards
 * everything is computed anew from the sums, so that nothing else need be kept.
 *
 * Maps are [batch, channels, size], or with `last` [batch, size, channels]. Both are walked in tiles of
 * `count` rows of `width` lanes: in the first layout the lanes of a tile share a channel, in the second each
 * is one. */

#include "passes.h"

#define LANES 16
#define WIDE 64
#define ROWS 64 /* rows whose sums are taken in float before they join those in double */
#define SUMS 4

/* The quantisers: of the sums (1), of the affine (2), behind the ReLU (3). Mirrored in edgemat/nn/stage.py.
 * With t = floor's argument in the rounding of the affine, its code is within the rails where bottom2 <= t <
 * top2, and that of the ReLU where bottom3 <= t < top3. */
typedef struct {
    int64_t batch, channels, size;
    int32_t last, threads, first, third, plain; /* plain: no statistics, the affine is the identity */
    int64_t points; /* binary points of the factor: none, one for all, or one by channel */
    float a_low, a_high;
    float twice1, step1, low1, high1;
    float scale2, step2, low2, high2, bottom2, top2;
    float scale3, step3, high3, bottom3, top3;
} EdgematStage;

/* Numbers by channel: about where sums are taken; the affine's factor; the affine in LSBs, one half of the
 * rounding in its offset; what batch norm's gradient takes off. */
enum { SHIFT, FACTOR, SCALED, BEGIN, SLOPE, MEAN_GRADIENT, NUMBERS };
/* Passes, and their sums by channel.
 * STATISTICS: q - shift, its square. FORWARD: none. GRADIENTS: g, g * (q - shift), g * y behind and before
 * the ReLU. INPUT: what the binary point of the sums gets.
 * BOTH, of a plain stage on sums as they are: the gradients of GRADIENTS and INPUT. */
enum { STATISTICS, FORWARD, GRADIENTS, INPUT, BOTH };

/* How many sums each of them has. */
static const int64_t sums_of[] = {2, 0, SUMS, 1, SUMS};

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS float within(float g, float t, float bottom, float top) { return t >= bottom && t < top ? g : 0.0f; }

/* `numbers` and `sums` are [NUMBERS, stride] and [SUMS, stride]. */
ALWAYS void tile(const EdgematStage* s, int pass, int first, int third, float* out, const float* x,
                 const float* g, const float* numbers, float* sums, int64_t stride, int64_t width,
                 int64_t count) {
    const EdgematStage k = *s;
    const float *shift = numbers + SHIFT * stride, *a = numbers + FACTOR * stride,
                *scaled = numbers + SCALED * stride, *begin = numbers + BEGIN * stride,
                *slope = numbers + SLOPE * stride, *mean = numbers + MEAN_GRADIENT * stride;
    float *one = sums, *two = sums + stride, *three = sums + 2 * stride, *four = sums + 3 * stride;
    const float bottom = third && k.bottom3 > k.bottom2 ? k.bottom3 : k.bottom2;
    const float top = third && k.top3 < k.top2 ? k.top3 : k.top2;
    for (int64_t row = 0; row < count; row++, x += width, g += width, out += width) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float code = first ? half_up(x[i] * k.twice1) : 0.0f, kept = clamped(code, k.low1, k.high1);
            const float q = first ? kept * k.step1 : x[i], d = q - shift[i];
            if (pass == STATISTICS) {
                one[i] += d;
                two[i] += d * d;
                continue;
            }
            const float t = transformed(q, scaled[i], begin[i]);
            const float y = clamped(floorf(t), k.low2, k.high2) * k.step2;
            /* Exact: the codes of y have at most 22 bits. */
            const float relu = third ? clamped(floorf(y * k.scale3 + 0.5f), 0.0f, k.high3) * k.step3 : y;
            if (pass == FORWARD) {
                out[i] = relu;
                continue;
            }
            const float before = within(g[i], t, bottom, top);
            if (pass == GRADIENTS || pass == BOTH) {
                if (pass == BOTH) out[i] = before;
                one[i] += before;
                two[i] += before * d;
                if (third) three[i] += g[i] * relu;
                four[i] += (third ? within(g[i], t, k.bottom3, k.top3) : g[i]) * y;
                continue;
            }
            const float dq = (before - mean[i] - d * slope[i]) * a[i];
            const float dx = !first || code == kept ? dq : 0.0f;
            out[i] = dx;
            if (first) one[i] += dx * x[i] - dq * q;
        }
    }
}

/* The same with what the stage has fixed, so that each combination becomes a loop of its own. */
#define WITH(PASS, FIRST, THIRD)                                                     \
    case (PASS) * 4 + (FIRST) * 2 + (THIRD):                                         \
        tile(s, PASS, FIRST, THIRD, out, x, g, numbers, sums, stride, width, count); \
        break
#define WITH_ALL(PASS) \
    WITH(PASS, 0, 0);  \
    WITH(PASS, 0, 1);  \
    WITH(PASS, 1, 0);  \
    WITH(PASS, 1, 1)

static void walk(const EdgematStage* s, int pass, float* out, const float* x, const float* g,
                 const float* numbers, float* sums, int64_t stride, int64_t width, int64_t count) {
    switch (pass * 4 + s->first * 2 + s->third) {
        WITH_ALL(STATISTICS);
        WITH_ALL(FORWARD);
        WITH_ALL(GRADIENTS);
        WITH_ALL(INPUT);
        WITH_ALL(BOTH);
    }
}

static void walk_planes(const EdgematStage* s, int pass, float* out, const float* x, const float* g,
                        const float* numbers, double* sums) {
    const int64_t channels = s->channels, size = s->size, whole = size / LANES, rest = size % LANES;
    const int64_t kinds = sums_of[pass];
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        float lanes[NUMBERS * LANES], part[SUMS * LANES] = {0.0f};
        double total[SUMS] = {0.0};
        int64_t taken = 0;
        for (int64_t i = 0; i < NUMBERS * LANES; i++) lanes[i] = numbers[i / LANES * channels + c];
        for (int64_t n = 0; n < s->batch; n++) {
            const int64_t plane = (n * channels + c) * size;
            for (int64_t row = 0; row <= whole; row += ROWS) {
                const int64_t at = plane + row * LANES, left = whole - row, count = left < ROWS ? left : ROWS;
                walk(s, pass, out + at, x + at, g + at, lanes, part, LANES, LANES, count);
                if (count < ROWS && rest) {
                    const int64_t end = at + count * LANES;
                    walk(s, pass, out + end, x + end, g + end, lanes, part, LANES, rest, 1);
                }
                taken += count + 1;
                if (taken < ROWS && n + 1 < s->batch) continue;
                taken = 0;
                for (int64_t i = 0; i < kinds * LANES; i++) {
                    total[i / LANES] += part[i];
                    part[i] = 0.0f;
                }
            }
        }
        for (int64_t i = 0; i < SUMS; i++) sums[i * channels + c] = total[i];
    }
}

static void walk_last(const EdgematStage* s, int pass, float* out, const float* x, const float* g,
                      const float* numbers, double* sums, double* room) {
    const int64_t channels = s->channels, total = s->batch * s->size * channels;
    /* Few channels: several pixels side by side, so that no sum waits for itself. */
    const int64_t width = channels < WIDE ? WIDE / channels * channels : channels;
    const int64_t kinds = sums_of[pass], all = SUMS * channels;
    float* lanes = (float*)(room + s->threads * all);
    float* parts = lanes + NUMBERS * width;
    for (int64_t i = 0; i < NUMBERS * width; i++)
        lanes[i] = numbers[i / width * channels + i % width % channels];
    for (int64_t i = 0; i < s->threads * all; i++) room[i] = 0.0;
#pragma omp parallel num_threads(s->threads)
    {
        const int64_t thread = this_thread();
        double* own = room + thread * all;
        float* part = parts + thread * SUMS * width;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < total; at += ROWS * width) {
            const int64_t left = total - at, count = left < ROWS * width ? left / width : ROWS;
            const int64_t end = at + count * width;
            for (int64_t i = 0; i < kinds * width; i++) part[i] = 0.0f;
            walk(s, pass, out + at, x + at, g + at, lanes, part, width, width, count);
            if (count < ROWS) walk(s, pass, out + end, x + end, g + end, lanes, part, width, total - end, 1);
            for (int64_t i = 0; i < kinds * width; i++)
                own[i / width * channels + i % width % channels] += part[i];
        }
    }
    for (int64_t i = 0; i < all; i++) {
        sums[i] = 0.0;
        for (int64_t thread = 0; thread < s->threads; thread++) sums[i] += room[thread * all + i];
    }
}

static void walk_all(const EdgematStage* s, int pass, float* out, const float* x, const float* g,
                     const float* numbers, double* sums, double* room) {
    if (s->last)
        walk_last(s, pass, out, x, g, numbers, sums, room);
    else
        walk_planes(s, pass, out, x, g, numbers, sums);
}

/* The fractional bits of a channel's factor. */
static inline int point(const EdgematStage* s, const float* points, int64_t c) {
    return (int)rintf(points[s->points == 1 ? 0 : c]);
}

/* Whether every fractional bit of the factors is in range. */
static int in_range(const EdgematStage* s, const float* points) {
    for (int64_t i = 0; i < s->points; i++)
        if (!(fabsf(rintf(points[i])) <= EXPONENT_LIMIT)) return 0;
    return 1;
}

/* Values, and (unless the stage is plain) by channel mean, unbiased variance, 1 / std, a and b. `room` holds
 * (threads + 1) * SUMS * channels doubles and, with w the larger of WIDE and channels, (2 * NUMBERS + threads
 * * SUMS) * w floats. Returns 0 where a binary point is out of range. */
int edgemat_stage_forward(const EdgematStage* s, float* y, float* found, const float* x, const float* gamma,
                          const float* beta, const float* points, double eps, double* room) {
    const int64_t channels = s->channels;
    const double count = (double)s->batch * (double)s->size;
    double* sums = room;
    float* numbers = (float*)(room + SUMS * channels);
    double* rest = (double*)(numbers + NUMBERS * (channels < WIDE ? WIDE : channels));
    if (!in_range(s, points)) return 0;
    for (int64_t c = 0; c < channels; c++) {
        numbers[SHIFT * channels + c] = x[s->last ? c : c * s->size];
        numbers[SCALED * channels + c] = s->scale2;
        numbers[BEGIN * channels + c] = 0.5f;
    }
    if (!s->plain) walk_all(s, STATISTICS, y, x, x, numbers, sums, rest);
    for (int64_t c = 0; c < channels && !s->plain; c++) {
        const double off = sums[c] / count, mean = numbers[SHIFT * channels + c] + off;
        const double spread = sums[channels + c] / count - off * off,
                     var = spread > 0.0 ? spread : 0.0 * spread;
        const double invstd = 1.0 / sqrt(var + eps);
        const float real = (float)(invstd * gamma[c]);
        float a = real;
        if (s->points) {
            const int f = point(s, points, c);
            a = ldexpf(clamped(half_up(ldexpf(real, f + 1)), s->a_low, s->a_high), -f);
        }
        const float b = (float)(beta[c] - mean * real);
        numbers[SCALED * channels + c] = a * s->scale2;
        numbers[BEGIN * channels + c] = b * s->scale2 + 0.5f;
        found[c] = (float)mean;
        found[channels + c] = (float)(var * (count / (count > 1.0 ? count - 1.0 : 1.0)));
        found[2 * channels + c] = (float)invstd;
        found[3 * channels + c] = a;
        found[4 * channels + c] = b;
    }
    walk_all(s, FORWARD, y, x, x, numbers, sums, rest);
    return 1;
}

/* Gradients of x, and in `found` by channel those of gamma, of beta and of the factors' binary points, then
 * those of the three binary points. `given` is what the forward pass found. */
void edgemat_stage_backward(const EdgematStage* s, float* dx, float* found, const float* g, const float* x,
                            const float* gamma, const float* points, const float* given, double* room) {
    const int64_t channels = s->channels;
    const double count = (double)s->batch * (double)s->size;
    const float *mean = given, *invstd = given + 2 * channels, *a = given + 3 * channels,
                *b = given + 4 * channels;
    double *sums = room, first = 0.0, second = 0.0, third = 0.0;
    float* numbers = (float*)(room + SUMS * channels);
    double* rest = (double*)(numbers + NUMBERS * (channels < WIDE ? WIDE : channels));
    for (int64_t c = 0; c < channels; c++) {
        numbers[SHIFT * channels + c] = s->plain ? 0.0f : mean[c];
        numbers[FACTOR * channels + c] = s->plain ? 1.0f : a[c];
        numbers[SCALED * channels + c] = s->plain ? s->scale2 : a[c] * s->scale2;
        numbers[BEGIN * channels + c] = s->plain ? 0.5f : b[c] * s->scale2 + 0.5f;
        numbers[SLOPE * channels + c] = numbers[MEAN_GRADIENT * channels + c] = 0.0f;
    }
    const int both = s->plain && !s->first;
    walk_all(s, both ? BOTH : GRADIENTS, dx, x, g, numbers, sums, rest);
    for (int64_t c = 0; c < channels && s->plain; c++) {
        second += sums[channels + c] - sums[3 * channels + c];
        third += sums[3 * channels + c] - sums[2 * channels + c];
    }
    for (int64_t c = 0; c < channels && !s->plain; c++) {
        const double plain = sums[c], centred = sums[channels + c], da = centred + mean[c] * plain;
        double inside = da, dpoint = 0.0;
        if (s->points) {
            const float real = (float)((double)invstd[c] * gamma[c]);
            const float code = half_up(ldexpf(real, point(s, points, c) + 1));
            inside = code >= s->a_low && code <= s->a_high ? da : 0.0;
            dpoint = LN2 * (inside * real - da * a[c]);
        }
        found[c] = (float)((inside - mean[c] * plain) * invstd[c]);
        found[channels + c] = (float)plain;
        found[2 * channels + c] = (float)dpoint;
        second += a[c] * da + b[c] * plain - sums[3 * channels + c];
        third += sums[3 * channels + c] - sums[2 * channels + c];
        numbers[SLOPE * channels + c] = (float)(centred * invstd[c] * invstd[c] / count);
        numbers[MEAN_GRADIENT * channels + c] = (float)(plain / count);
    }
    if (!both) walk_all(s, INPUT, dx, x, g, numbers, sums, rest);
    for (int64_t c = 0; c < channels && s->first; c++) first += sums[c];
    found[3 * channels] = (float)(LN2 * first);
    found[3 * channels + 1] = (float)(LN2 * second);
    found[3 * channels + 2] = (float)(LN2 * third);
}
