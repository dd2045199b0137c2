/* y[i] = requantize(x[i] >= 0 ? x[i] * 2**align : x[i] * slope[c]), c = i % channels.
 * EM_X EM_W EM_ACC_BITS EM_Y, epilogue macros. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_prelu_s8_s8_s32
#endif

void EM_FUNCTION(const em_prelu_params* p, const EM_X* x, const EM_W* slope, const em_epilogue* epilogue,
                 EM_Y* y);
void EM_FUNCTION(const em_prelu_params* p, const EM_X* x, const EM_W* slope, const em_epilogue* epilogue,
                 EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    int32_t c = 0;
    int32_t channel = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        const EM_ACC v = (EM_ACC)x[i];
        y[i] = EM_RESULT(v >= 0 ? EM_SHIFT_LEFT(v, p->align) : EM_PRODUCT(v, slope[c]), channel);
        c = c + 1 < p->channels ? c + 1 : 0;
        channel = EM_NEXT_CHANNEL(epilogue, channel);
    }
}
#include "edgemat_variant_end.h"
