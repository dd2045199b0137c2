/* linear.c for weights -1 and +1 (edgemat_minus.h); x of any codes.
 * EM_W is uint32_t. EM_X EM_B EM_ACC_BITS EM_Y, epilogue macros. */
#ifndef EM_W
#define EM_W uint32_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_u32_s32__bipolar
#endif
#include "edgemat_minus.h"

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t words = (p->in_features + 31) / 32;
    for (int32_t r = 0; r < p->rows; ++r, x += p->in_features, y += p->out_features) {
        const EM_MINUS_ACC all = EM_PASTE(EM_FUNCTION, _all)(0, x, p->in_features);
        const EM_W* w = weight;
        for (int32_t o = 0; o < p->out_features; ++o, w += words) {
            const EM_MINUS_ACC minus = EM_PASTE(EM_FUNCTION, _minus)(0, x, w, 0, p->in_features);
            const EM_MINUS_ACC start = p->has_bias ? (EM_MINUS_ACC)(EM_ACC)bias[o] : 0;
            const EM_ACC a = (EM_ACC)(start + all - minus - minus);
            y[o] = EM_RESULT(a, o);
        }
    }
}
#undef EM_MINUS_ACC
#include "edgemat_variant_end.h"
