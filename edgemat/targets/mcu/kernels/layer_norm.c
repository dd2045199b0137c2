/* Rows x[rows][features] with d = features * x - sum(x): z = round(d / sqrt(features * sum of x * x -
 * sum(x)**2 + offset)), y = requantize(z * gain + bias). EM_X EM_W (gain) EM_B EM_ACC_BITS EM_Y, epilogue
 * macros, EM_TOTAL_BITS EM_NORM_BITS EM_NORM_ROUNDING EM_NORM_OVERFLOW. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#include "edgemat_rows.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_layer_norm_s8_s32
#endif

void EM_FUNCTION(const em_norm_params* p, const EM_X* x, const EM_W* gain, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_norm_params* p, const EM_X* x, const EM_W* gain, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t row = 0; row < p->rows; ++row) {
        int32_t channel = 0;
        EM_TOTAL total = 0, sum = 0;
        for (int32_t i = 0; i < p->features; ++i) {
            const EM_TOTAL v = (EM_TOTAL)x[i];
            sum += v;
            total += v * v;
        }
        total = total * (EM_TOTAL)p->features - sum * sum;
        const em_scale scale =
            em_reciprocal_root((uint64_t)total + (uint64_t)p->total_offset, (uint32_t)p->root);
        const EM_NORM mean = (EM_NORM)sum; /* times features */
        for (int32_t i = 0; i < p->features; ++i) {
            const EM_NORM d = (EM_NORM)x[i] * (EM_NORM)p->features - mean;
            y[i] = EM_RESULT(EM_SCALED(EM_NORMALIZED(d, scale), i), channel);
            channel = EM_NEXT_CHANNEL(epilogue, channel);
        }
        x += p->features;
        y += p->features;
    }
}
#include "edgemat_rows_end.h"
#include "edgemat_variant_end.h"
