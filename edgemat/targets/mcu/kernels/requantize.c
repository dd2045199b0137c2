/* y[i] = requantize(x[i]).   EM_X EM_ACC_BITS EM_Y, epilogue macros. May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_requantize_s8_s32
#endif

void EM_FUNCTION(const em_requantize_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_requantize_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    int32_t channel = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        y[i] = EM_RESULT((EM_ACC)x[i], channel);
        channel = EM_NEXT_CHANNEL(epilogue, channel);
    }
}
#include "edgemat_variant_end.h"
