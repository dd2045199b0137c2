/* linear.c for weights -1, 0 and +1 in bytes of EM_TRITS, by tables of sums (edgemat_trits.h, which states
 * the macros EM_TRITS EM_LANES EM_ENTRY_BITS EM_OFFSET EM_TABLES and the layout of the weights). EM_W is
 * uint8_t. EM_X EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * scratch: aligned to 8 bytes; EM_TABLES tables of 84 (EM_TRITS 4) or 252 entries, one sum for each output,
 * with two lanes in_features words more. */
#ifndef EM_W
#define EM_W uint8_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_linear_s8_u8_s32__trits
#endif
#include "edgemat_trits.h"

void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y, void* scratch);
void EM_FUNCTION(const em_linear_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y, void* scratch) {
    const EM_B* const given = p->has_bias ? bias : NULL;
    const EM_PASTE(EM_FUNCTION, _space) space = EM_PASTE(EM_FUNCTION, _divide)(scratch, p->out_features);
    for (int32_t r = 0; r < p->rows; r += EM_LANES) { /* a last row alone goes in both lanes */
        EM_Y* const next = EM_LANES == 2 && r + 1 < p->rows ? y + p->out_features : y;
#if EM_LANES == 2
        const EM_X* const other = r + 1 < p->rows ? x + p->in_features : x;
        for (int32_t i = 0; i < p->in_features; ++i) {
            const int32_t first = x[i], second = other[i];
            space.row[i] = (uint32_t)first + ((uint32_t)second << 16);
        }
        const EM_IN* const from = space.row;
#else
        const EM_IN* const from = x;
#endif
        EM_PASTE(EM_FUNCTION, _sums)(&space, from, p->in_features, weight, given, p->out_features);
        EM_PASTE(EM_FUNCTION, _results)(space.sums, given, epilogue, 0, p->out_features, y, next);
        y = next + p->out_features;
        x += EM_LANES == 2 ? p->in_features + p->in_features : p->in_features;
    }
}
#include "edgemat_trits_end.h"
#include "edgemat_variant_end.h"
