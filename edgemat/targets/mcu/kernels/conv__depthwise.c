/* conv.c for in_c = out_c = groups: y[oy][ox][c] = requantize(bias[c] + sum over taps of x[iy][ix][c] *
 * w[c][ky][kx]). EM_X EM_W EM_B EM_ACC_BITS EM_SUM_BITS EM_Y, epilogue macros.
 *
 * Weight layout: channels in blocks of four, each block [ky][kx][4]; a last block of fewer by its own number.
 */
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_s8_s32__depthwise
#endif

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t channels = p->in_c;
    const int32_t row = p->kernel_h * p->kernel_w;
    const int32_t step_w = p->dilation_w * channels;
    const int32_t step_h = p->dilation_h * p->in_w * channels;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const EM_X* const corner = x + (ky.first * p->in_w + kx.first) * channels;
            const EM_W* w = weight;
            int32_t c = 0;
            for (; c + 4 <= channels; c += 4, w += 4 * row) {
                EM_SUM a0 = p->has_bias ? (EM_SUM)bias[c] : 0;
                EM_SUM a1 = p->has_bias ? (EM_SUM)bias[c + 1] : 0;
                EM_SUM a2 = p->has_bias ? (EM_SUM)bias[c + 2] : 0;
                EM_SUM a3 = p->has_bias ? (EM_SUM)bias[c + 3] : 0;
                const EM_X* xr = corner + c;
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += step_h) {
                    const EM_X* xi = xr;
                    const EM_W* wi = w + (k * p->kernel_w + kx.begin) * 4;
                    for (int32_t t = kx.begin; t < kx.end; ++t, xi += step_w, wi += 4) {
                        a0 = (EM_SUM)(a0 + EM_PRODUCT(xi[0], wi[0]));
                        a1 = (EM_SUM)(a1 + EM_PRODUCT(xi[1], wi[1]));
                        a2 = (EM_SUM)(a2 + EM_PRODUCT(xi[2], wi[2]));
                        a3 = (EM_SUM)(a3 + EM_PRODUCT(xi[3], wi[3]));
                    }
                }
                y[c] = EM_RESULT(a0, c);
                y[c + 1] = EM_RESULT(a1, c + 1);
                y[c + 2] = EM_RESULT(a2, c + 2);
                y[c + 3] = EM_RESULT(a3, c + 3);
            }
            for (; c < channels; ++c, w += row) {
                EM_SUM a = p->has_bias ? (EM_SUM)bias[c] : 0;
                const EM_X* xr = corner + c;
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += step_h) {
                    const EM_X* xi = xr;
                    const EM_W* wi = w + k * p->kernel_w + kx.begin;
                    for (int32_t t = kx.begin; t < kx.end; ++t, xi += step_w, ++wi) {
                        a = (EM_SUM)(a + EM_PRODUCT(*xi, *wi));
                    }
                }
                y[c] = EM_RESULT(a, c);
            }
            y += channels;
        }
    }
}
#include "edgemat_variant_end.h"
