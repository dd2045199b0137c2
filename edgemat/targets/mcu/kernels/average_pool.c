/* y[oy][ox][c] = overflow(round(sum over the window * 2**-shift / count)), one exact rational, rounded once.
 * EM_X EM_ACC_BITS EM_Y, epilogue macros, and EM_DIVIDE:
 *   0: count is the same power of two everywhere and the caller has added its logarithm to shift;
 *   1: count = elements inside the map, or inside the padded map where count_include_pad is set; the caller
 * has proven that sum * 2**-shift (left shifts) and count * 2**shift (right shifts) stay below a quarter of
 * EM_ACC. */
#include "edgemat_variant.h"
#include "edgemat_window.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_average_pool_s8_s32
#endif
#ifndef EM_DIVIDE
#define EM_DIVIDE 1
#endif

void EM_FUNCTION(const em_pool_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_pool_params* p, const EM_X* x, const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const int32_t y0 = oy * p->stride_h - p->pad_top;
        const em_span ky = em_taps(y0, 1, p->kernel_h, p->in_h);
        const em_span padded_y =
            em_taps(y0 + p->pad_top, 1, p->kernel_h, p->in_h + p->pad_top + p->pad_bottom);
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const int32_t x0 = ox * p->stride_w - p->pad_left;
            const em_span kx = em_taps(x0, 1, p->kernel_w, p->in_w);
            const em_span padded_x =
                em_taps(x0 + p->pad_left, 1, p->kernel_w, p->in_w + p->pad_left + p->pad_right);
            const int32_t rows = p->count_include_pad ? padded_y.end - padded_y.begin : ky.end - ky.begin;
            const int32_t columns = p->count_include_pad ? padded_x.end - padded_x.begin : kx.end - kx.begin;
            const EM_ACC count = (EM_ACC)(rows * columns);
            const EM_X* const corner = x + (ky.first * p->in_w + kx.first) * p->in_c;
            for (int32_t c = 0; c < p->in_c; ++c) {
                const EM_X* xr = corner + c;
                EM_ACC sum = 0;
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += p->in_w * p->in_c) {
                    const EM_X* xi = xr;
                    for (int32_t t = kx.begin; t < kx.end; ++t, xi += p->in_c) {
                        sum += (EM_ACC)*xi;
                    }
                }
#if EM_DIVIDE
                const int shift = EM_PER_CHANNEL ? em_shift[c] : em_shift0;
                const EM_ACC numerator = EM_SHIFT_LEFT(sum, shift < 0 ? -shift : 0);
                const EM_ACC denominator = EM_SHIFT_LEFT(count, shift > 0 ? shift : 0);
                const EM_ACC q = EM_PASTE(em_divide_s, EM_ACC_BITS)(numerator, denominator, EM_ROUNDING);
                *y++ = (EM_Y)EM_PASTE(em_overflow_s, EM_ACC_BITS)(q, (EM_ACC)EM_Y_MIN, (EM_ACC)EM_Y_MAX,
                                                                  EM_OVERFLOW);
#else
                (void)count;
                *y++ = EM_RESULT(sum, c);
#endif
            }
        }
    }
}
#include "edgemat_variant_end.h"
