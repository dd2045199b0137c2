/* y[oy][ox][o] = requantize(bias[o] + sum of x[iy][ix][i] * w[o][ky][kx][i] over all iy, ky with
 * iy*stride_h + ky*dilation_h - pad_top = oy, and so along the width, and over the inputs of o's group).
 * EM_X EM_W EM_B EM_ACC_BITS EM_Y, epilogue macros. Weight layout: plain [o][ky][kx][i]. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_transpose_s8_s8_s32
#endif

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            for (int32_t o = 0; o < p->out_c; ++o) {
                const int32_t origin = o / group_out * group_in;
                EM_ACC a = p->has_bias ? (EM_ACC)bias[o] : 0;
                for (int32_t ky = 0; ky < p->kernel_h; ++ky) {
                    const int32_t ty = oy + p->pad_top - ky * p->dilation_h;
                    if (ty < 0 || ty % p->stride_h != 0 || ty / p->stride_h >= p->in_h) {
                        continue;
                    }
                    for (int32_t kx = 0; kx < p->kernel_w; ++kx) {
                        const int32_t tx = ox + p->pad_left - kx * p->dilation_w;
                        if (tx < 0 || tx % p->stride_w != 0 || tx / p->stride_w >= p->in_w) {
                            continue;
                        }
                        const EM_X* xi =
                            x + (ty / p->stride_h * p->in_w + tx / p->stride_w) * p->in_c + origin;
                        const EM_W* wi = weight + ((o * p->kernel_h + ky) * p->kernel_w + kx) * group_in;
                        for (int32_t i = 0; i < group_in; ++i) {
                            a += EM_PRODUCT(xi[i], wi[i]);
                        }
                    }
                }
                *y++ = EM_RESULT(a, o);
            }
        }
    }
}
#include "edgemat_variant_end.h"
