/* y = overflow(round(x0[row][i] * 2**-x1[row])), x1 >= 0.
 * EM_X EM_X1 EM_ACC_BITS EM_Y EM_ROUNDING EM_OVERFLOW EM_Y_MIN EM_Y_MAX; no exponent exceeds the
 * accumulator's width - 2. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_token_quantize_s8_s8_s32
#endif

void EM_FUNCTION(const em_rows_params* p, const EM_X* x0, const EM_X1* x1, EM_Y* y);
void EM_FUNCTION(const em_rows_params* p, const EM_X* x0, const EM_X1* x1, EM_Y* y) {
    for (int32_t row = 0; row < p->rows; ++row) {
        const int shift = (int)x1[row];
        for (int32_t i = 0; i < p->features; ++i) {
            y[i] = (EM_Y)EM_PASTE(em_requantize_s, EM_ACC_BITS)((EM_ACC)x0[i], shift, (EM_ACC)EM_Y_MIN,
                                                                (EM_ACC)EM_Y_MAX, EM_SHIFT_ANY, EM_ROUNDING,
                                                                EM_OVERFLOW, 0);
        }
        x0 += p->features;
        y += p->features;
    }
}
#include "edgemat_variant_end.h"
