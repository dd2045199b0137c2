/* Nearest neighbour: y[oy][ox][c] = x[oy / scale_h][ox / scale_w][c].   EM_X (= EM_Y). */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_upsample_s8
#endif

void EM_FUNCTION(const em_upsample_params* p, const EM_X* x, EM_X* y);
void EM_FUNCTION(const em_upsample_params* p, const EM_X* x, EM_X* y) {
    for (int32_t oy = 0; oy < p->in_h * p->scale_h; ++oy) {
        for (int32_t ox = 0; ox < p->in_w * p->scale_w; ++ox) {
            const EM_X* const pixel = x + (oy / p->scale_h * p->in_w + ox / p->scale_w) * p->in_c;
            for (int32_t c = 0; c < p->in_c; ++c) {
                *y++ = pixel[c];
            }
        }
    }
}
#include "edgemat_variant_end.h"
