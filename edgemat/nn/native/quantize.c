/* Single passes over float32 tensors for training: rounding half up and saturating, and the gradients of
 * both.
 *
 * Every value is computed with the operations of the eager path in `rounding.py` and `affine.py`, in their
 * order and without contraction, so values are equal to the bit; sums are taken in another order, in blocks
 * and then in double. Threads are those of the OpenMP runtime that torch has loaded. */

#include <math.h>
#include <stdint.h>

#define BLOCK 1024
#define SMALL 32768

/* The modes of rounding: half up of a doubled value, half up by adding just below one half, floor of a
 * shifted one. */
enum { DOUBLED = 0, BELOW_HALF = 1, SHIFTED = 2 };

static inline float clamped(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline float masked(float g, float z, float low, float high) {
    return (z <= low || z >= high) ? 0.0f : g;
}

/* y = clamp(round(x * scale)) * step; x and y may be the same. */
void edgemat_quantize(float* y, const float* x, int64_t n, float scale, float step, float low, float high,
                      int mode, int threads) {
#pragma omp parallel for num_threads(threads) if (n > SMALL) schedule(static)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        if (mode == DOUBLED) {
            const float twice = scale * 2.0f;
#pragma omp simd
            for (int64_t i = start; i < end; i++)
                y[i] = clamped(ceilf(floorf(x[i] * twice) * 0.5f), low, high) * step;
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

/* a * x + b, rounded once where torch's batch norm does so. */
static inline float transformed(float x, float a, float b) {
#ifdef __FP_FAST_FMAF
    return fmaf(x, a, b);
#else
    return x * a + b;
#endif
}

/* y = clamp(floor(a * x + b)) * step of [batch, channels, size]. */
void edgemat_affine(float* y, const float* x, const float* a, const float* b, int64_t batch, int64_t channels,
                    int64_t size, float step, float low, float high, int threads) {
    const int64_t rows = batch * channels;
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float ac = a[row % channels], bc = b[row % channels];
        const float* from = x + row * size;
        float* to = y + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            to[i] = clamped(floorf(transformed(from[i], ac, bc)), low, high) * step;
    }
}

/* Sum of squared differences from the mean of one channel of [batch, channels, size]. */
static double squares(const float* x, double mean, int64_t c, int64_t batch, int64_t channels, int64_t size) {
    double total = 0.0;
    for (int64_t n = 0; n < batch; n++) {
        const float* from = x + (n * channels + c) * size;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += (from[i] - mean) * (from[i] - mean);
        total += sum;
    }
    return total;
}

/* The running value after a batch whose statistics weigh `momentum`. */
static inline float moved(float running, double momentum, double seen) {
    return (float)(momentum * seen + (1.0 - momentum) * running);
}

/* Biased variance per channel of [batch, channels, size] about the mean; moves the running statistics. */
void edgemat_statistics(float* var, float* running_mean, float* running_var, const float* x,
                        const float* mean, int64_t batch, int64_t channels, int64_t size, double momentum,
                        int threads) {
    const double count = (double)batch * (double)size;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const double sum = squares(x, mean[c], c, batch, channels, size);
        running_mean[c] = moved(running_mean[c], momentum, mean[c]);
        running_var[c] = moved(running_var[c], momentum, sum / (count - 1.0));
        var[c] = (float)(sum / count);
    }
}

/* y = clamp(floor(gamma * (x - mean) * invstd + beta)) * step of [batch, channels, size], the statistics
 * being those of the batch; writes invstd and moves the running statistics. */
void edgemat_norm(float* y, float* invstd, float* running_mean, float* running_var, const float* x,
                  const float* mean, const float* gamma, const float* beta, int64_t batch, int64_t channels,
                  int64_t size, double momentum, double eps, float step, float low, float high, int threads) {
    const double count = (double)batch * (double)size;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const double sum = squares(x, mean[c], c, batch, channels, size);
        running_mean[c] = moved(running_mean[c], momentum, mean[c]);
        running_var[c] = moved(running_var[c], momentum, sum / (count - 1.0));
        invstd[c] = (float)(1.0 / sqrt(sum / count + eps));
        const float a = invstd[c] * gamma[c], shift = mean[c] * a, b = beta[c] - shift;
        for (int64_t n = 0; n < batch; n++) {
            const float* from = x + (n * channels + c) * size;
            float* to = y + (n * channels + c) * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++)
                to[i] = clamped(floorf(transformed(from[i], a, b)), low, high) * step;
        }
    }
}

/* Gradients of a quantised training batch norm of [batch, channels, size], z = a * x + b, a = gamma * invstd.
 * Writes dx, dgamma, dbeta; the return value is sum(g * y). */
double edgemat_norm_backward(float* dx, float* dgamma, float* dbeta, const float* g, const float* x,
                             const float* y, const float* a, const float* b, const float* mean,
                             const float* invstd, int64_t batch, int64_t channels, int64_t size, float low,
                             float high, int threads) {
    double total = 0.0;
    const double count = (double)batch * (double)size;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static) \
    reduction(+ : total)
    for (int64_t c = 0; c < channels; c++) {
        const float ac = a[c], bc = b[c], mc = mean[c];
        double plain = 0.0, centred = 0.0;
        for (int64_t n = 0; n < batch; n++) {
            const int64_t row = (n * channels + c) * size;
            for (int64_t start = 0; start < size; start += BLOCK) {
                const int64_t end = start + BLOCK < size ? start + BLOCK : size;
                float sum = 0.0f, product = 0.0f, values = 0.0f;
#pragma omp simd reduction(+ : sum, product, values)
                for (int64_t i = row + start; i < row + end; i++) {
                    const float inside = masked(g[i], x[i] * ac + bc, low, high);
                    sum += inside;
                    product += inside * (x[i] - mc);
                    values += g[i] * y[i];
                }
                plain += sum;
                centred += product;
                total += values;
            }
        }
        dgamma[c] = (float)(centred * invstd[c]);
        dbeta[c] = (float)plain;
        const float slope = (float)(centred * invstd[c] * invstd[c] / count), offset = (float)(plain / count);
        for (int64_t n = 0; n < batch; n++) {
            const int64_t row = (n * channels + c) * size;
#pragma omp simd
            for (int64_t i = row; i < row + size; i++) {
                const float inside = masked(g[i], x[i] * ac + bc, low, high);
                dx[i] = (inside - offset - (x[i] - mc) * slope) * ac;
            }
        }
    }
    return total;
}

/* y = clamp(round(x * twice / 2)) * step per row of [rows, size]. */
void edgemat_quantize_rows(float* y, const float* x, const float* twice, const float* step, int64_t rows,
                           int64_t size, float low, float high, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float t = twice[row], s = step[row];
        const float* from = x + row * size;
        float* to = y + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) to[i] = clamped(ceilf(floorf(from[i] * t) * 0.5f), low, high) * s;
    }
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
                const float rounded = ceilf(floorf(x[i] * t) * 0.5f);
                const float inside = masked(g[i], rounded, low - 0.5f, high + 0.5f);
                dx[i] = inside;
                sum += inside * x[i] - g[i] * y[i];
            }
            total += sum;
        }
        df[row] = (float)(total * 0x1.62e42fefa39efp-1);
    }
}
