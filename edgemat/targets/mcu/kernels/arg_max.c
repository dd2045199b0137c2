/* y[outer][inner] = index of the largest x[outer][.][inner]; the first of equals, or the last where `last` is
 * set. EM_X EM_Y. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_arg_max_s8_s32
#endif

void EM_FUNCTION(const em_arg_max_params* p, const EM_X* x, EM_Y* y);
void EM_FUNCTION(const em_arg_max_params* p, const EM_X* x, EM_Y* y) {
    for (int32_t i = 0; i < p->outer; ++i) {
        for (int32_t j = 0; j < p->inner; ++j) {
            const EM_X* const column = x + i * p->axis_size * p->inner + j;
            EM_X best = column[0];
            int32_t index = 0;
            for (int32_t k = 1; k < p->axis_size; ++k) {
                const EM_X v = column[k * p->inner];
                if (v > best || (p->last && v == best)) {
                    best = v;
                    index = k;
                }
            }
            *y++ = (EM_Y)index;
        }
    }
}
#include "edgemat_variant_end.h"
