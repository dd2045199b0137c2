/* What the single passes of training share.
 *
 * Every value is computed with the operations of the eager path in `rounding.py` and `affine.py`, in their
 * order and without contraction, so values are equal to the bit; sums are taken in another order, in blocks
 * and then in double. Threads are those of the OpenMP runtime that torch has loaded. */

#ifndef EDGEMAT_PASSES_H
#define EDGEMAT_PASSES_H

#include <math.h>
#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCK 1024
#define SMALL 32768
#define LN2 0x1.62e42fefa39efp-1
/* Binary points beyond it are an error that the caller names. */
#define EXPONENT_LIMIT 120

static inline int64_t this_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static inline float clamped(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline float masked(float g, float z, float low, float high) {
    return (z <= low || z >= high) ? 0.0f : g;
}

/* Half of `twice`, rounded half up. */
static inline float half_up(float twice) { return ceilf(floorf(twice) * 0.5f); }

/* a * x + b, rounded once where torch's batch norm does so. */
static inline float transformed(float x, float a, float b) {
#ifdef __FP_FAST_FMAF
    return fmaf(x, a, b);
#else
    return x * a + b;
#endif
}

#endif /* EDGEMAT_PASSES_H */
