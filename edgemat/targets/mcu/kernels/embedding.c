/* y[r][.] = table[x[r]][.].   EM_X EM_Y (also the table's element). Every index is below the table's entries:
 * the generated model checks those that come from outside and returns EM_ERROR_RANGE. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_embedding_s8_s32
#endif

void EM_FUNCTION(const em_embedding_params* p, const EM_X* x, const EM_Y* table, EM_Y* y);
void EM_FUNCTION(const em_embedding_params* p, const EM_X* x, const EM_Y* table, EM_Y* y) {
    for (int32_t r = 0; r < p->rows; ++r) {
        const EM_Y* const row = table + (int32_t)x[r] * p->depth;
        for (int32_t d = 0; d < p->depth; ++d) {
            *y++ = row[d];
        }
    }
}
#include "edgemat_variant_end.h"
