/* Training batch norms with the quantiser behind them in single passes over float32 tensors of
 * [batch, channels, size]. */

#include "passes.h"

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

/* Sum of squared differences from the mean of channel c; moves its running statistics. */
static double channel_statistics(float* running_mean, float* running_var, const float* x, const float* mean,
                                 int64_t c, int64_t batch, int64_t channels, int64_t size, double momentum) {
    const double sum = squares(x, mean[c], c, batch, channels, size);
    running_mean[c] = moved(running_mean[c], momentum, mean[c]);
    running_var[c] = moved(running_var[c], momentum, sum / ((double)batch * (double)size - 1.0));
    return sum;
}

/* Biased variance per channel of [batch, channels, size] about the mean; moves the running statistics. */
void edgemat_statistics(float* var, float* running_mean, float* running_var, const float* x,
                        const float* mean, int64_t batch, int64_t channels, int64_t size, double momentum,
                        int threads) {
    const double count = (double)batch * (double)size;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const double sum =
            channel_statistics(running_mean, running_var, x, mean, c, batch, channels, size, momentum);
        var[c] = (float)(sum / count);
    }
}

/* y = clamp(round((gamma * (x - mean) * invstd + beta) * scale)) * step of [batch, channels, size], the
 * statistics being those of the batch; writes invstd and moves the running statistics. */
void edgemat_norm(float* y, float* invstd, float* running_mean, float* running_var, const float* x,
                  const float* mean, const float* gamma, const float* beta, int64_t batch, int64_t channels,
                  int64_t size, double momentum, double eps, float scale, float step, float low, float high,
                  int threads) {
    const double count = (double)batch * (double)size;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const double sum =
            channel_statistics(running_mean, running_var, x, mean, c, batch, channels, size, momentum);
        invstd[c] = (float)(1.0 / sqrt(sum / count + eps));
        const float a = invstd[c] * (gamma[c] * scale), shift = mean[c] * a,
                    b = beta[c] * scale + 0.5f - shift;
        for (int64_t n = 0; n < batch; n++) {
            const float* from = x + (n * channels + c) * size;
            float* to = y + (n * channels + c) * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++)
                to[i] = clamped(floorf(transformed(from[i], a, b)), low, high) * step;
        }
    }
}

/* Gradients of z = a * x + b of [batch, channels, size] where a and b contain the batch's statistics: dx, and
 * per channel sum(inside * (x - mean)) * invstd and sum(inside). Returns sum(g * y). */
double edgemat_affine_backward(float* dx, float* dgamma, float* dbeta, const float* g, const float* x,
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

/* Gradients of a quantised training batch norm: dx, dgamma, dbeta; `a` and `b` are room for one number per
 * channel. Returns the gradient of the binary point, by <inside, z> = <gamma, dgamma> + <beta, dbeta>. */
double edgemat_norm_backward(float* dx, float* dgamma, float* dbeta, float* a, float* b, const float* g,
                             const float* x, const float* y, const float* gamma, const float* beta,
                             const float* mean, const float* invstd, int64_t batch, int64_t channels,
                             int64_t size, float low, float high, int threads) {
    for (int64_t c = 0; c < channels; c++) {
        a[c] = gamma[c] * invstd[c];
        b[c] = beta[c] - a[c] * mean[c];
    }
    double total = -edgemat_affine_backward(dx, dgamma, dbeta, g, x, y, a, b, mean, invstd, batch, channels,
                                            size, low, high, threads);
    for (int64_t c = 0; c < channels; c++) total += (double)gamma[c] * dgamma[c] + (double)beta[c] * dbeta[c];
    return LN2 * total;
}

/* A training batch norm as a fixed-point affine: the factor a = gamma * invstd is rounded to a binary point
 * of its own, b = beta - mean * a is not; then y = clamp(round((a * x + b) * scale)) * step. Writes the
 * rounded a, b and invstd, and moves the running statistics. `points` binary points: one per channel or one
 * for all. Returns 0 where one of them is out of range. */
int edgemat_norm_affine(float* y, float* a, float* b, float* invstd, float* running_mean, float* running_var,
                        const float* x, const float* mean, const float* gamma, const float* beta,
                        const float* frac, int64_t points, int64_t batch, int64_t channels, int64_t size,
                        double momentum, float eps, float a_low, float a_high, float scale, float step,
                        float low, float high, int threads) {
    const double count = (double)batch * (double)size;
    for (int64_t i = 0; i < points; i++)
        if (!(fabsf(rintf(frac[i])) <= EXPONENT_LIMIT)) return 0;
#pragma omp parallel for num_threads(threads) if (batch * channels * size > SMALL) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const double sum =
            channel_statistics(running_mean, running_var, x, mean, c, batch, channels, size, momentum);
        const int f = (int)rintf(frac[points == 1 ? 0 : c]);
        invstd[c] = 1.0f / sqrtf((float)(sum / count) + eps);
        const float real = invstd[c] * gamma[c], shift = mean[c] * real;
        a[c] = clamped(half_up(real * ldexpf(1.0f, f + 1)), a_low, a_high) * ldexpf(1.0f, -f);
        b[c] = beta[c] - shift;
        const float scaled = a[c] * scale, offset = b[c] * scale + 0.5f;
        for (int64_t n = 0; n < batch; n++) {
            const float* from = x + (n * channels + c) * size;
            float* to = y + (n * channels + c) * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++)
                to[i] = clamped(floorf(transformed(from[i], scaled, offset)), low, high) * step;
        }
    }
    return 1;
}

/* Gradients of `edgemat_norm_affine`: dx, dgamma, dbeta, and per channel that of the binary point of a.
 * Returns that of the binary point of y. */
double edgemat_norm_affine_backward(float* dx, float* dgamma, float* dbeta, float* dfrac, const float* g,
                                    const float* x, const float* y, const float* gamma, const float* a,
                                    const float* b, const float* mean, const float* invstd, const float* frac,
                                    int64_t points, int64_t batch, int64_t channels, int64_t size,
                                    float a_low, float a_high, float low, float high, int threads) {
    double total = -edgemat_affine_backward(dx, dgamma, dbeta, g, x, y, a, b, mean, invstd, batch, channels,
                                            size, low, high, threads);
    for (int64_t c = 0; c < channels; c++) {
        const float da = dgamma[c] / invstd[c] + mean[c] * dbeta[c], real = invstd[c] * gamma[c];
        const float rounded = half_up(real * ldexpf(1.0f, (int)rintf(frac[points == 1 ? 0 : c]) + 1));
        const float inside = masked(da, rounded, a_low - 0.5f, a_high + 0.5f);
        total += (double)a[c] * da + (double)b[c] * dbeta[c];
        dfrac[c] = (float)(LN2 * ((double)inside * real - (double)da * a[c]));
        /* b = beta - mean * real has its share in the gradient of the real factor. */
        dgamma[c] = (inside - mean[c] * dbeta[c]) * invstd[c];
    }
    return LN2 * total;
}
