/* y[r][o] = requantize(bias[o] + sum_i x[r][i] * w[o][i]).
 * EM_X EM_W EM_B EM_ACC_BITS EM_SUM_BITS EM_Y, epilogue macros.
 *
 * Weight layout: rows (output features) in blocks of four, each block interleaved: block o/4 holds
 * w[o..o+3][0], w[o..o+3][1], ... so that one loaded input meets four weights. Where two or three rows are
 * left, the last four rows follow as one more block (one or two of them twice); a single row left follows
 * plainly, and so do all rows where there are fewer than four. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_s8_s32
#endif
#include "edgemat_dot.h"

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    const em_walk walk = {1, p->in_features, 0, 0};
    const EM_B* const given = p->has_bias ? bias : NULL;
    for (int32_t r = 0; r < p->rows; ++r, x += p->in_features, y += p->out_features) {
        (void)EM_PASTE(EM_FUNCTION, _rows)(epilogue, x, weight, given, &walk, 1, 0, 0, 0, p->in_features, 0,
                                           p->out_features, y);
    }
}
#include "edgemat_variant_end.h"
