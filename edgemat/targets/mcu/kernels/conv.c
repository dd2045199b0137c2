/* y[oy][ox][o] = requantize(bias[o] + sum over taps and inputs of its group of x[iy][ix][i] *
 * w[o][ky][kx][i]), iy = oy*stride_h - pad_top + ky*dilation_h, and so ix; taps outside the map count as
 * zero. EM_X EM_W EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * Weight layout: inside each group, rows (output channels) in blocks of four interleaved as in linear.c, a
 * row being [ky][kx][i]. Where inputs of neighbouring taps are neighbours in memory (one group, no dilation
 * along the width) all taps of a kernel row run in one loop. */
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_s8_s32
#endif
#include "edgemat_dot.h"

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t row = p->kernel_h * p->kernel_w * group_in;
    const int32_t step_h = p->dilation_h * p->in_w * p->in_c;
    const int32_t step_w = p->dilation_w * p->in_c;
    const int32_t joined = p->groups == 1 && p->dilation_w == 1;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const EM_X* const corner = x + (ky.first * p->in_w + kx.first) * p->in_c;
            const EM_W* w = weight;
            for (int32_t g = 0, o = 0; g < p->groups; ++g) {
                const EM_X* const origin = corner + g * group_in;
                int32_t left = group_out;
                for (; left >= 4; left -= 4, o += 4, w += 4 * row) {
                    EM_ACC sums[4] = {0, 0, 0, 0};
                    if (p->has_bias) {
                        for (int32_t k = 0; k < 4; ++k) {
                            sums[k] = (EM_ACC)bias[o + k];
                        }
                    }
                    const EM_W* wr = w + (ky.begin * p->kernel_w + kx.begin) * group_in * 4;
                    if (joined) {
                        EM_PASTE(EM_FUNCTION, _dot)(sums, origin, wr, (kx.end - kx.begin) * group_in,
                                                    ky.end - ky.begin, step_h, p->kernel_w * group_in * 4);
                    } else {
                        const EM_X* xr = origin;
                        for (int32_t k = ky.begin; k < ky.end;
                             ++k, xr += step_h, wr += p->kernel_w * group_in * 4) {
                            EM_PASTE(EM_FUNCTION, _dot)(sums, xr, wr, group_in, kx.end - kx.begin, step_w,
                                                        group_in * 4);
                        }
                    }
                    for (int32_t k = 0; k < 4; ++k) {
                        y[o + k] = EM_RESULT(sums[k], o + k);
                    }
                }
                for (int32_t b = 0; b < left; ++b) {
                    EM_ACC a = p->has_bias ? (EM_ACC)bias[o + b] : 0;
                    for (int32_t k = ky.begin; k < ky.end; ++k) {
                        const EM_X* xr = origin + (k - ky.begin) * step_h;
                        const EM_W* wr = w + (k * p->kernel_w + kx.begin) * group_in * left + b;
                        for (int32_t t = kx.begin; t < kx.end; ++t, xr += step_w) {
                            for (int32_t i = 0; i < group_in; ++i, wr += left) {
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
