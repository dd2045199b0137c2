/* y[i] = requantize(clamp(x[i] * 2**align, low, high)).   EM_X EM_ACC_BITS EM_Y, epilogue macros.
 * May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_clip_s8_s32
#endif

void EM_FUNCTION(const em_clip_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_clip_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const EM_ACC low = (EM_ACC)p->low;
    const EM_ACC high = (EM_ACC)p->high;
    int32_t channel = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        EM_ACC a = EM_SHIFT_LEFT((EM_ACC)x[i], p->align);
        a = a < low ? low : a;
        a = a > high ? high : a;
        y[i] = EM_RESULT(a, channel);
        channel = EM_NEXT_CHANNEL(epilogue, channel);
    }
}
#include "edgemat_variant_end.h"
