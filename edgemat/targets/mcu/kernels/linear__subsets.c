/* linear.c for weights -1 and +1 and x of any codes, by sums of subsets of inputs (edgemat_subsets.h).
 * EM_W is uint32_t. EM_X EM_B EM_ACC_BITS EM_Y EM_WORDS EM_OUTPUTS, epilogue macros. */
#ifndef EM_W
#define EM_W uint32_t
#endif
#ifndef EM_WORDS
#define EM_WORDS 32
#endif
#ifndef EM_OUTPUTS
#define EM_OUTPUTS 32
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_u32_s32__subsets
#endif
#include "edgemat_subsets.h"

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    struct EM_PASTE(EM_FUNCTION, _space) space;
    const int32_t length = p->in_features;
    for (int32_t i = length; i < (length + 31) / 32 * 32; ++i) {
        space.row[i] = 0;
    }
    for (int32_t r = 0; r < p->rows; ++r, x += length, y += p->out_features) {
        for (int32_t i = 0; i < length; ++i) {
            space.row[i] = x[i];
        }
        EM_PASTE(EM_FUNCTION, _outputs)(&space, length, weight, p->has_bias ? bias : NULL, epilogue, 0,
                                        p->out_features, y);
    }
}
#undef EM_SUBSET_ACC
#include "edgemat_variant_end.h"
#undef EM_WORDS
#undef EM_OUTPUTS
