/* y[i] = requantize(scale[c] * x[i] + bias[c]), c = i % channels.
 * EM_X EM_W EM_B EM_ACC_BITS EM_Y, epilogue macros. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_affine_s8_s8_s32
#endif

void EM_FUNCTION(const em_affine_params* p, const EM_X* x, const EM_W* scale, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_affine_params* p, const EM_X* x, const EM_W* scale, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    int32_t c = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        const EM_ACC a = (EM_ACC)bias[c] + EM_PRODUCT(x[i], scale[c]);
        y[i] = EM_RESULT(a, c);
        c = c + 1 < p->channels ? c + 1 : 0;
    }
}
#include "edgemat_variant_end.h"
