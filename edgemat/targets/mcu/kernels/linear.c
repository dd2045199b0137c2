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

void EM_FUNCTION(const em_linear_params *p, const EM_X *x, const EM_W *weight, const EM_B *bias,
                 const em_epilogue *epilogue, EM_Y *y);
void EM_FUNCTION(const em_linear_params *p, const EM_X *x, const EM_W *weight, const EM_B *bias,
                 const em_epilogue *epilogue, EM_Y *y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t length = p->in_features;
    const int32_t rows = p->out_features;
    for (int32_t r = 0; r < p->rows; ++r) {
        const EM_W *w = weight;
        int32_t o = 0;
        for (; o + 4 <= rows; o += 4) {
            EM_ACC a0 = p->has_bias ? (EM_ACC)bias[o] : 0;
            EM_ACC a1 = p->has_bias ? (EM_ACC)bias[o + 1] : 0;
            EM_ACC a2 = p->has_bias ? (EM_ACC)bias[o + 2] : 0;
            EM_ACC a3 = p->has_bias ? (EM_ACC)bias[o + 3] : 0;
            const EM_X *xi = x;
            for (const EM_X *const end = x + length; xi != end; ++xi, w += 4) {
                const EM_ACC v = (EM_ACC)*xi;
                a0 += v * (EM_ACC)w[0];
                a1 += v * (EM_ACC)w[1];
                a2 += v * (EM_ACC)w[2];
                a3 += v * (EM_ACC)w[3];
            }
            y[o] = EM_RESULT(a0, o);
            y[o + 1] = EM_RESULT(a1, o + 1);
            y[o + 2] = EM_RESULT(a2, o + 2);
            y[o + 3] = EM_RESULT(a3, o + 3);
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
