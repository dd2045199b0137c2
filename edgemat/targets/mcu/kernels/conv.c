/* y[oy][ox][o] = requantize(bias[o] + sum over taps and inputs of its group of x[iy][ix][i] *
 * w[o][ky][kx][i]), iy = oy*stride_h - pad_top + ky*dilation_h, and so ix; taps outside the map count as
 * zero. EM_X EM_W EM_B EM_ACC_BITS EM_SUM_BITS EM_Y, epilogue macros.
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
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t row = p->kernel_h * p->kernel_w * group_in;
    const int joined = p->groups == 1 && p->dilation_w == 1;
    const int32_t x_row = p->dilation_h * p->in_w * p->in_c;
    const int32_t w_row = p->kernel_w * group_in;
    const EM_B* const given = p->has_bias ? bias : NULL;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox, y += p->out_c) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const int32_t taps = kx.end - kx.begin;
            const int32_t kernel_rows = ky.end - ky.begin;
            em_walk walk;
            walk.runs = joined ? kernel_rows : taps;
            walk.length = joined ? taps * group_in : group_in;
            walk.x_skip = (joined ? x_row : p->dilation_w * p->in_c) - walk.length;
            walk.w_skip = joined ? w_row - walk.length : 0;
            const int32_t w_first = ky.begin * w_row + kx.begin * group_in;
            const EM_X* origin = x + (ky.first * p->in_w + kx.first) * p->in_c;
            const EM_W* w = weight;
            for (int32_t o = 0; o < p->out_c; o += group_out, origin += group_in) {
                w = EM_PASTE(EM_FUNCTION, _rows)(epilogue, origin, w, given, &walk, joined ? 1 : kernel_rows,
                                                 x_row, w_row, w_first, row, o, group_out, y);
            }
        }
    }
}
#include "edgemat_variant_end.h"
