/* y[i] = table[x[i] - x_min].   EM_X EM_Y (also the table's element). May run in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_table_s8_s32
#endif

void EM_FUNCTION(const em_table_params* p, const EM_X* x, const EM_Y* table, EM_Y* y);
void EM_FUNCTION(const em_table_params* p, const EM_X* x, const EM_Y* table, EM_Y* y) {
    for (int32_t i = 0; i < p->size; ++i) {
        y[i] = table[(int32_t)x[i] - p->x_min];
    }
}
#include "edgemat_variant_end.h"
