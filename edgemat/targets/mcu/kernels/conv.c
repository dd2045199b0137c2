/* y[oy][ox][o] = requantize(bias[o] + sum over taps and inputs of its group of x[iy][ix][i] * w[o][ky][kx][i]),
 * iy = oy*stride_h - pad_top + ky*dilation_h, and so ix; taps outside the map count as zero.
 * EM_X EM_W EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * Weight layout: inside each group, rows (output channels) in blocks of four interleaved as in linear.c, a row
 * being [ky][kx][i]. Where inputs of neighbouring taps are neighbours in memory (one group, no dilation along
 * the width) all taps of a kernel row run in one loop. */
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_s8_s32
#endif

void EM_FUNCTION(const em_conv_params *p, const EM_X *x, const EM_W *weight, const EM_B *bias,
                 const em_epilogue *epilogue, EM_Y *y);
void EM_FUNCTION(const em_conv_params *p, const EM_X *x, const EM_W *weight, const EM_B *bias,
                 const em_epilogue *epilogue, EM_Y *y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t row = p->kernel_h * p->kernel_w * group_in;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const int32_t joined = p->groups == 1 && p->dilation_w == 1;
            const int32_t runs = joined ? (kx.end > kx.begin ? 1 : 0) : kx.end - kx.begin;
            const int32_t length = joined ? (kx.end - kx.begin) * group_in : group_in;
            const EM_X *const corner = x + (ky.first * p->in_w + kx.first) * p->in_c;
            const EM_W *w = weight;
            for (int32_t g = 0, o = 0; g < p->groups; ++g) {
                const EM_X *const origin = corner + g * group_in;
                int32_t left = group_out;
                for (; left >= 4; left -= 4, o += 4, w += 4 * row) {
                    EM_ACC a0 = p->has_bias ? (EM_ACC)bias[o] : 0;
                    EM_ACC a1 = p->has_bias ? (EM_ACC)bias[o + 1] : 0;
                    EM_ACC a2 = p->has_bias ? (EM_ACC)bias[o + 2] : 0;
                    EM_ACC a3 = p->has_bias ? (EM_ACC)bias[o + 3] : 0;
                    for (int32_t k = ky.begin; k < ky.end; ++k) {
                        const EM_X *xr = origin + (k - ky.begin) * p->dilation_h * p->in_w * p->in_c;
                        const EM_W *wr = w + (k * p->kernel_w + kx.begin) * group_in * 4;
                        for (int32_t t = 0; t < runs; ++t, xr += p->dilation_w * p->in_c) {
                            const EM_X *xi = xr;
                            for (const EM_X *const end = xr + length; xi != end; ++xi, wr += 4) {
                                const EM_ACC v = (EM_ACC)*xi;
                                a0 += v * (EM_ACC)wr[0];
                                a1 += v * (EM_ACC)wr[1];
                                a2 += v * (EM_ACC)wr[2];
                                a3 += v * (EM_ACC)wr[3];
                            }
                        }
                    }
                    y[o] = EM_RESULT(a0, o);
                    y[o + 1] = EM_RESULT(a1, o + 1);
                    y[o + 2] = EM_RESULT(a2, o + 2);
                    y[o + 3] = EM_RESULT(a3, o + 3);
                }
                for (int32_t b = 0; b < left; ++b) {
                    EM_ACC a = p->has_bias ? (EM_ACC)bias[o + b] : 0;
                    for (int32_t k = ky.begin; k < ky.end; ++k) {
                        const EM_X *xr = origin + (k - ky.begin) * p->dilation_h * p->in_w * p->in_c;
                        const EM_W *wr = w + (k * p->kernel_w + kx.begin) * group_in * left + b;
                        for (int32_t t = 0; t < runs; ++t, xr += p->dilation_w * p->in_c) {
                            for (int32_t i = 0; i < length; ++i, wr += left) {
                                a += (EM_ACC)xr[i] * (EM_ACC)*wr;
                            }
                        }
                    }
                    y[o + b] = EM_RESULT(a, o + b);
                }
                o += left;
                w += left * row;
            }
            y += p->out_c;
        }
    }
}
#include "edgemat_variant_end.h"
