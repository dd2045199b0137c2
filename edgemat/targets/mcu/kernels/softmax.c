/* Along the middle axis of [outer][axis_size][inner], with d = max(x) - x and e = exp_table[d]:
 * y = overflow(round(e * 2**shift / sum(e))), one exact rational, rounded once.
 * EM_X EM_W (the table's element) EM_ACC_BITS EM_Y EM_ROUNDING EM_OVERFLOW EM_Y_MIN EM_Y_MAX. The caller has
 * proven that sum(e) and e * 2**shift stay below a quarter of EM_ACC; exp_table[0] is positive. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_softmax_s8_s8_s32
#endif

void EM_FUNCTION(const em_softmax_params* p, const EM_X* x, const EM_W* exp_table, EM_Y* y);
void EM_FUNCTION(const em_softmax_params* p, const EM_X* x, const EM_W* exp_table, EM_Y* y) {
    for (int32_t o = 0; o < p->outer; ++o) {
        for (int32_t j = 0; j < p->inner; ++j) {
            const int32_t column = o * p->axis_size * p->inner + j;
            EM_X largest = x[column];
            for (int32_t k = 1; k < p->axis_size; ++k) {
                const EM_X v = x[column + k * p->inner];
                largest = v > largest ? v : largest;
            }
            EM_ACC sum = 0;
            for (int32_t k = 0; k < p->axis_size; ++k) {
                sum += (EM_ACC)exp_table[(int32_t)largest - (int32_t)x[column + k * p->inner]];
            }
            for (int32_t k = 0; k < p->axis_size; ++k) {
                const int32_t at = column + k * p->inner;
                const EM_ACC e = (EM_ACC)exp_table[(int32_t)largest - (int32_t)x[at]];
                const EM_ACC q =
                    EM_PASTE(em_divide_s, EM_ACC_BITS)(EM_SHIFT_LEFT(e, p->shift), sum, EM_ROUNDING);
                y[at] = (EM_Y)EM_PASTE(em_overflow_s, EM_ACC_BITS)(q, (EM_ACC)EM_Y_MIN, (EM_ACC)EM_Y_MAX,
                                                                   EM_OVERFLOW);
            }
        }
    }
}
#include "edgemat_variant_end.h"
