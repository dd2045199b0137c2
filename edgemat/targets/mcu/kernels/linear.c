/* y[r][o] = requantize(bias[o] + sum_i x[r][i] * w[o][i]).
 * EM_X EM_W EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * Weight layout: rows (output features) in blocks of four, each block interleaved: block o/4 holds
 * w[o..o+3][0], w[o..o+3][1], ... so that one loaded input meets four weights; a last block of fewer rows is
 * interleaved by its own height. Nothing is padded. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_s8_s32
#endif
#include "edgemat_dot.h"

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t length = p->in_features;
    const int32_t rows = p->out_features;
    for (int32_t r = 0; r < p->rows; ++r) {
        const EM_W* w = weight;
        int32_t o = 0;
        for (; o + 4 <= rows; o += 4, w += 4 * length) {
            EM_ACC sums[4] = {0, 0, 0, 0};
            if (p->has_bias) {
                for (int32_t k = 0; k < 4; ++k) {
                    sums[k] = (EM_ACC)bias[o + k];
                }
            }
            EM_PASTE(EM_FUNCTION, _dot)(sums, x, w, length, 1, 0, 0);
            for (int32_t k = 0; k < 4; ++k) {
                y[o + k] = EM_RESULT(sums[k], o + k);
            }
        }
        const int32_t left = rows - o;
        for (int32_t k = 0; k < left; ++k) {
            EM_ACC a = p->has_bias ? (EM_ACC)bias[o + k] : 0;
            for (int32_t i = 0; i < length; ++i) {
                a += (EM_ACC)x[i] * (EM_ACC)w[i * left + k];
            }
            y[o + k] = EM_RESULT(a, o + k);
        }
        x += length;
        y += rows;
    }
}
#include "edgemat_variant_end.h"
