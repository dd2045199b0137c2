/* The affine of a training batch norm with the quantiser behind it in single passes over float32 tensors of
 * [batch, channels, size]; what `stage.c` does not cover. */

#include "passes.h"

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
