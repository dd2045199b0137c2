/* conv.c for weights -1 and +1 (edgemat_minus.h); x of any codes, a row of weights being [ky][kx][i].
 * EM_W is uint32_t. EM_X EM_B EM_ACC_BITS EM_Y, epilogue macros. */
#ifndef EM_W
#define EM_W uint32_t
#endif
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_u32_s32__bipolar
#endif
#include "edgemat_minus.h"

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t words = (p->kernel_h * p->kernel_w * group_in + 31) / 32;
    const int joined = p->groups == 1 && p->dilation_w == 1;
    const int32_t x_row = p->dilation_h * p->in_w * p->in_c;
    const int32_t x_step = p->dilation_w * p->in_c;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox, y += p->out_c) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const int32_t taps = kx.end - kx.begin;
            const int32_t runs = joined && taps > 0 ? 1 : taps;
            const int32_t length = joined ? taps * group_in : group_in;
            const EM_X* origin = x + (ky.first * p->in_w + kx.first) * p->in_c;
            const EM_W* w = weight;
            for (int32_t first = 0; first < p->out_c; first += group_out, origin += group_in) {
                EM_MINUS_ACC all = 0;
                const EM_X* xr = origin;
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += x_row) {
                    for (int32_t t = 0; t < runs; ++t) {
                        all = EM_PASTE(EM_FUNCTION, _all)(all, xr + t * x_step, length);
                    }
                }
                for (int32_t o = first; o < first + group_out; ++o, w += words) {
                    EM_MINUS_ACC minus = 0;
                    xr = origin;
                    for (int32_t k = ky.begin; k < ky.end; ++k, xr += x_row) {
                        int32_t bit = (k * p->kernel_w + kx.begin) * group_in;
                        for (int32_t t = 0; t < runs; ++t, bit += length) {
                            minus = EM_PASTE(EM_FUNCTION, _minus)(minus, xr + t * x_step, w, bit, length);
                        }
                    }
                    const EM_MINUS_ACC start = p->has_bias ? (EM_MINUS_ACC)(EM_ACC)bias[o] : 0;
                    const EM_ACC a = (EM_ACC)(start + all - minus - minus);
                    y[o] = EM_RESULT(a, o);
                }
            }
        }
    }
}
#undef EM_MINUS_ACC
#include "edgemat_variant_end.h"
