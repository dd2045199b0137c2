/* y = x with before[k] and after[k] elements of `value` around axis k.   EM_X (= EM_Y). */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_pad_s8
#endif

void EM_FUNCTION(const em_pad_params* p, const EM_X* x, EM_X* y);
void EM_FUNCTION(const em_pad_params* p, const EM_X* x, EM_X* y) {
    const EM_X value = (EM_X)p->value;
    for (int32_t i0 = -p->before[0]; i0 < p->in_dims[0] + p->after[0]; ++i0) {
        for (int32_t i1 = -p->before[1]; i1 < p->in_dims[1] + p->after[1]; ++i1) {
            for (int32_t i2 = -p->before[2]; i2 < p->in_dims[2] + p->after[2]; ++i2) {
                const int inside = i0 >= 0 && i0 < p->in_dims[0] && i1 >= 0 && i1 < p->in_dims[1] &&
                                   i2 >= 0 && i2 < p->in_dims[2];
                const int32_t row =
                    inside ? ((i0 * p->in_dims[1] + i1) * p->in_dims[2] + i2) * p->in_dims[3] : 0;
                for (int32_t i3 = -p->before[3]; i3 < p->in_dims[3] + p->after[3]; ++i3) {
                    *y++ = inside && i3 >= 0 && i3 < p->in_dims[3] ? x[row + i3] : value;
                }
            }
        }
    }
}
#include "edgemat_variant_end.h"
