/* Rows x[rows][features]: z = round(x * sqrt(features / (sum of x * x + offset))), y = requantize(z * gain +
 * bias). EM_X EM_W (gain) EM_B EM_ACC_BITS EM_Y, epilogue macros, EM_TOTAL_BITS EM_NORM_BITS EM_NORM_ROUNDING
 * EM_NORM_OVERFLOW. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#include "edgemat_rows.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_rms_norm_s8_s32
#endif

void EM_FUNCTION(const em_norm_params* p, const EM_X* x, const EM_W* gain, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_norm_params* p, const EM_X* x, const EM_W* gain, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t row = 0; row < p->rows; ++row) {
        int32_t channel = 0;
        EM_TOTAL total = 0;
        for (int32_t i = 0; i < p->features; ++i) {
            const EM_TOTAL v = (EM_TOTAL)x[i];
            total += v * v;
        }
        const em_scale scale =
            em_reciprocal_root((uint64_t)total + (uint64_t)p->total_offset, (uint32_t)p->root);
        for (int32_t i = 0; i < p->features; ++i) {
            y[i] = EM_RESULT(EM_SCALED(EM_NORMALIZED(x[i], scale), i), channel);
            channel = EM_NEXT_CHANNEL(epilogue, channel);
        }
        x += p->features;
        y += p->features;
    }
}
#include "edgemat_rows_end.h"
#include "edgemat_variant_end.h"
