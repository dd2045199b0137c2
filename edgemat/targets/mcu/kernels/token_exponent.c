/* y[row] = the smallest e >= 0 with every |x[row][.]| below 2**(e + width - 1).   EM_X EM_ACC_BITS EM_Y. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_token_exponent_s8_s32
#endif

void EM_FUNCTION(const em_token_exponent_params* p, const EM_X* x, EM_Y* y);
void EM_FUNCTION(const em_token_exponent_params* p, const EM_X* x, EM_Y* y) {
    for (int32_t row = 0; row < p->rows; ++row) {
        EM_ACC largest = 0;
        for (int32_t i = 0; i < p->features; ++i) {
            const EM_ACC v = (EM_ACC)x[i];
            const EM_ACC size = v < 0 ? -v : v;
            largest = size > largest ? size : largest;
        }
        int32_t exponent = 0;
        for (largest >>= p->width - 1; largest != 0; largest >>= 1) {
            ++exponent;
        }
        y[row] = (EM_Y)exponent;
        x += p->features;
    }
}
#include "edgemat_variant_end.h"
