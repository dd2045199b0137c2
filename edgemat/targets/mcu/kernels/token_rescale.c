/* y = requantize(x0[row][i] * 2**x1[row]), x1 >= 0.
 * EM_X EM_X1 EM_ACC_BITS EM_Y, epilogue macros. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_token_rescale_s8_s8_s32
#endif

void EM_FUNCTION(const em_rows_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y);
void EM_FUNCTION(const em_rows_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t row = 0; row < p->rows; ++row) {
        int32_t channel = 0;
        const int shift = (int)x1[row];
        for (int32_t i = 0; i < p->features; ++i) {
            y[i] = EM_RESULT(EM_SHIFT_LEFT((EM_ACC)x0[i], shift), channel);
            channel = EM_NEXT_CHANNEL(epilogue, channel);
        }
        x0 += p->features;
        y += p->features;
    }
}
#include "edgemat_variant_end.h"
