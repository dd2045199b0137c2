/* Rounding half up and saturating, and its gradients, in single passes over float32 tensors. */

#include "passes.h"

/* The modes of rounding: half up of a doubled value, half up by adding just below one half, floor of a
 * shifted one. */
enum { DOUBLED = 0, BELOW_HALF = 1, SHIFTED = 2 };

/* y = clamp(round(x * scale)) * step; x and y may be the same. */
void edgemat_quantize(float* y, const float* x, int64_t n, float scale, float step, float low, float high,
                      int mode, int threads) {
#pragma omp parallel for num_threads(threads) if (n > SMALL) schedule(static)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        if (mode == DOUBLED) {
            const float twice = scale * 2.0f;
#pragma omp simd
            for (int64_t i = start; i < end; i++) y[i] = clamped(half_up(x[i] * twice), low, high) * step;
        } else if (mode == BELOW_HALF) {
#pragma omp simd
            for (int64_t i = start; i < end; i++)
                y[i] = clamped(floorf(x[i] * scale + 0x1.fffffep-2f), low, high) * step;
        } else {
#pragma omp simd
            for (int64_t i = start; i < end; i++) y[i] = clamped(floorf(x[i]), low, high) * step;
        }
    }
}

/* dx = g where low < x < high, else 0; the return value is sum(dx * x - g * y). */
double edgemat_quantize_backward(float* dx, const float* g, const float* x, const float* y, int64_t n,
                                 float low, float high, int threads) {
    double total = 0.0;
#pragma omp parallel for num_threads(threads) if (n > SMALL) schedule(static) reduction(+ : total)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) {
            const float inside = masked(g[i], x[i], low, high);
            dx[i] = inside;
            sum += inside * x[i] - g[i] * y[i];
        }
        total += sum;
    }
    return total;
}

/* Scale and step of every row: twice = 2**(f + 1) * scale and step = 2**-f / scale, f rounded half to even.
 * The scale is 1, or gamma where var is NULL, or that of a batch norm to be folded in: gamma / sqrt(var +
 * eps), 1 where it is 0. Returns whether every f is in range. */
static int row_factors(float* twice, float* step, const float* frac, const float* gamma, const float* var,
                       double eps, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
        const float f = rintf(frac[row]);
        if (!(fabsf(f) <= EXPONENT_LIMIT)) return 0;
        twice[row] = ldexpf(1.0f, (int)f + 1);
        step[row] = ldexpf(1.0f, -(int)f);
        if (!var && !gamma) continue;
        float scale = gamma ? gamma[row] : 1.0f;
        if (var) {
            const double invstd = 1.0 / sqrt((double)var[row] + eps);
            scale = (float)(gamma ? invstd * (double)gamma[row] : invstd);
            if (scale == 0.0f) scale = 1.0f;
        }
        twice[row] *= scale;
        step[row] /= scale;
    }
    return 1;
}

/* y = clamp(round(x * 2**f * scale)) * 2**-f / scale per row of [rows, size]; writes `twice` and `step`.
 * Returns the largest sum of a row's absolute codes, or -1 where a binary point is out of range. */
double edgemat_quantize_rows(float* y, float* twice, float* step, const float* x, const float* frac,
                             const float* gamma, const float* var, double eps, int64_t rows, int64_t size,
                             float low, float high, int threads) {
    if (!row_factors(twice, step, frac, gamma, var, eps, rows)) return -1.0;
    double most = 0.0;
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL) schedule(static) reduction(max : most)
    for (int64_t row = 0; row < rows; row++) {
        const float t = twice[row], s = step[row];
        const float* from = x + row * size;
        float* to = y + row * size;
        double total = 0.0;
        for (int64_t start = 0; start < size; start += BLOCK) {
            const int64_t end = start + BLOCK < size ? start + BLOCK : size;
            double sum = 0.0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float code = clamped(half_up(from[i] * t), low, high);
                sum += fabsf(code);
                to[i] = code * s;
            }
            total += sum;
        }
        most = total > most ? total : most;
    }
    return most;
}

/* Biases on the grid 2**-(f + shift): the values, in double, and the largest absolute code; -1 where a binary
 * point is out of range or a bias is no number. `steps` binary points: one for each bias, or one for all. */
double edgemat_quantize_bias(double* y, const float* bias, const float* frac, int64_t steps, int64_t n,
                             int64_t shift, double low, double high) {
    double most = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t f = (int64_t)rintf(frac[steps == 1 ? 0 : i]) + shift;
        if (f > EXPONENT_LIMIT || f < -EXPONENT_LIMIT) return -1.0;
        double code = ceil(floor((double)bias[i] * ldexp(1.0, (int)f + 1)) * 0.5);
        if (!(fabs(code) <= 0x1p1000)) return -1.0;
        code = code < low ? low : code > high ? high : code;
        most = fabs(code) > most ? fabs(code) : most;
        y[i] = code * ldexp(1.0, (int)-f);
    }
    return most;
}

/* dx = g where x rounds into low..high, else 0; df[row] = ln2 * sum(dx * x - g * y) per row. */
void edgemat_quantize_rows_backward(float* dx, float* df, const float* g, const float* x, const float* y,
                                    const float* twice, int64_t rows, int64_t size, float low, float high,
                                    int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float t = twice[row];
        double total = 0.0;
        for (int64_t start = 0; start < size; start += BLOCK) {
            const int64_t end = start + BLOCK < size ? start + BLOCK : size;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = row * size + start; i < row * size + end; i++) {
                const float rounded = half_up(x[i] * t);
                const float inside = masked(g[i], rounded, low - 0.5f, high + 0.5f);
                dx[i] = inside;
                sum += inside * x[i] - g[i] * y[i];
            }
            total += sum;
        }
        df[row] = (float)(total * LN2);
    }
}
