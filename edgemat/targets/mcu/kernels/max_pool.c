/* y[oy][ox][c] = requantize(largest x[iy][ix][c] of the window's part inside the map); every window has one.
 * EM_X EM_ACC_BITS EM_Y, epilogue macros. */
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_max_pool_s8_s32
#endif

void EM_FUNCTION(const em_pool_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_pool_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t step_w = p->dilation_w * p->in_c;
    const int32_t step_h = p->dilation_h * p->in_w * p->in_c;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const EM_X* const corner = x + (ky.first * p->in_w + kx.first) * p->in_c;
            for (int32_t c = 0; c < p->in_c; ++c) {
                const EM_X* xr = corner + c;
                EM_X best = *xr;
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += step_h) {
                    const EM_X* xi = xr;
                    for (int32_t t = kx.begin; t < kx.end; ++t, xi += step_w) {
                        best = *xi > best ? *xi : best;
                    }
                }
                *y++ = EM_RESULT((EM_ACC)best, c);
            }
        }
    }
}
#include "edgemat_variant_end.h"
