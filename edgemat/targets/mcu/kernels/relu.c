/* y[i] = requantize(max(x[i], 0)).   EM_X EM_ACC_BITS EM_Y, epilogue macros. May run in place if |X| = |Y|.
 */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_relu_s8_s32
#endif

void EM_FUNCTION(const em_relu_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_relu_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    int32_t channel = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        const EM_ACC a = (EM_ACC)x[i];
        y[i] = EM_RESULT(a > 0 ? a : 0, channel);
        channel = EM_NEXT_CHANNEL(epilogue, channel);
    }
}
#include "edgemat_variant_end.h"
