/* linear.c for signs: x codes are -1 and +1, weights rows of bits (edgemat_signs.h), so
 *   y[r][o] = requantize(bias[o] + in_features - 2 * (signs in which x[r] and w[o] differ)).
 * EM_X is int8_t, EM_W uint32_t. EM_B EM_ACC_BITS EM_Y, epilogue macros.
 * EM_WORDS: words that hold a row of in_features signs, or more. */
#include "edgemat_signs.h"
#ifndef EM_WORDS
#define EM_WORDS 32
#endif
#ifndef EM_W
#define EM_W uint32_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_u32_s32__xnor
#endif

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    uint32_t signs[EM_WORDS];
    const int32_t words = (p->in_features + 31) / 32;
    for (int32_t r = 0; r < p->rows; ++r, x += p->in_features, y += p->out_features) {
        em_signs bits = {signs, 0, 32};
        em_signs_append(&bits, x, p->in_features);
        em_signs_end(&bits);
        const EM_W* w = weight;
        for (int32_t o = 0; o < p->out_features; ++o, w += words) {
            const EM_ACC start = (p->has_bias ? (EM_ACC)bias[o] : 0) + (EM_ACC)p->in_features;
            const EM_ACC a = start - 2 * (EM_ACC)em_signs_differ(signs, w, words);
            y[o] = EM_RESULT(a, o);
        }
    }
}
#include "edgemat_variant_end.h"
#undef EM_WORDS
