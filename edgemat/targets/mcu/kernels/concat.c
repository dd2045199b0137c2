/* Copies one input of a Concat: y[outer][row] at offset .. offset+inner-1 = x[outer][inner].   EM_X (= EM_Y).
 */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_concat_s8
#endif

void EM_FUNCTION(const em_concat_params* p, const EM_X* x, EM_X* y);
void EM_FUNCTION(const em_concat_params* p, const EM_X* x, EM_X* y) {
    y += p->offset;
    for (int32_t i = 0; i < p->outer; ++i) {
        for (int32_t j = 0; j < p->inner; ++j) {
            y[j] = x[j];
        }
        x += p->inner;
        y += p->row;
    }
}
#include "edgemat_variant_end.h"
