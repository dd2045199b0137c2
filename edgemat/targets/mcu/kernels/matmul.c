/* y[b][i][j] = requantize(sum_k x0[b][i][k] * x1[b][k][j]).   EM_X EM_X1 EM_ACC_BITS EM_Y, epilogue macros.
 * Channel j of the epilogue is the last axis. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_matmul_s8_s8_s32
#endif

void EM_FUNCTION(const em_matmul_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y);
void EM_FUNCTION(const em_matmul_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t b = 0; b < p->batch; ++b) {
        for (int32_t i = 0; i < p->m; ++i) {
            for (int32_t j = 0; j < p->n; ++j) {
                const EM_X1* column = x1 + j;
                EM_ACC a = 0;
                for (int32_t k = 0; k < p->k; ++k, column += p->n) {
                    a += (EM_ACC)x0[k] * (EM_ACC)*column;
                }
                *y++ = EM_RESULT(a, j);
            }
            x0 += p->k;
        }
        x1 += p->k * p->n;
    }
}
#include "edgemat_variant_end.h"
