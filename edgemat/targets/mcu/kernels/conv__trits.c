/* conv.c for weights -1, 0 and +1 in bytes of EM_TRITS, by tables of sums (edgemat_trits.h, which states the
 * macros EM_TRITS EM_LANES EM_ENTRY_BITS EM_OFFSET EM_TABLES and the layout of the weights); a row of weights
 * is [ky][kx][i], taps outside the map count as zero. With two lanes, two neighbouring positions at a time.
 * EM_W is uint8_t. EM_X EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * scratch: aligned to 8 bytes; EM_TABLES tables of 84 (EM_TRITS 4) or 252 entries, one sum for each output of a
 * group, one input (a word with two lanes) for each weight of an output. */
#ifndef EM_W
#define EM_W uint8_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_u8_s32__trits
#endif
#include "edgemat_trits.h"

/* The inputs of position `at` and, with two lanes, of the one behind it, from channel `first`. */
static void EM_PASTE(EM_FUNCTION, _gather)(const em_conv_params* p, const EM_X* x, int32_t oy, int32_t ox,
                                           int32_t first, int32_t count, int lane, EM_IN* row) {
    for (int32_t ky = 0; ky < p->kernel_h; ++ky) {
        const int32_t iy = oy * p->stride_h - p->pad_top + ky * p->dilation_h;
        for (int32_t kx = 0; kx < p->kernel_w; ++kx, row += count) {
            const int32_t ix = ox * p->stride_w - p->pad_left + kx * p->dilation_w;
            const int inside = iy >= 0 && iy < p->in_h && ix >= 0 && ix < p->in_w;
            const EM_X* const from = inside ? x + (iy * p->in_w + ix) * p->in_c + first : x;
#if EM_LANES == 2
            if (lane > 0) {
                for (int32_t i = 0; i < count && inside; ++i) {
                    const int32_t value = from[i];
                    row[i] += (uint32_t)value << 16;
                }
                continue;
            }
#endif
            (void)lane;
            for (int32_t i = 0; i < count; ++i) {
                row[i] = (EM_IN)(inside ? from[i] : 0);
            }
        }
    }
}

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y, void* scratch);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y, void* scratch) {
    const EM_B* const given = p->has_bias ? bias : NULL;
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t length = p->kernel_h * p->kernel_w * group_in;
    const int32_t bytes = (length + EM_TRITS - 1) / EM_TRITS * group_out;
    const EM_PASTE(EM_FUNCTION, _space) space = EM_PASTE(EM_FUNCTION, _divide)(scratch, group_out);
    int32_t oy = 0, ox = 0;
    while (oy < p->out_h) {
        const int32_t next_x = ox + 1 < p->out_w ? ox + 1 : 0;
        const int32_t next_y = next_x > 0 ? oy : oy + 1;
        const int two = EM_LANES == 2 && next_y < p->out_h; /* else the last position goes in both lanes */
        EM_Y* const z = two ? y + p->out_c : y;
        const EM_W* w = weight;
        for (int32_t g = 0; g < p->groups; ++g, w += bytes) {
            EM_PASTE(EM_FUNCTION, _gather)(p, x, oy, ox, g * group_in, group_in, 0, space.row);
#if EM_LANES == 2
            EM_PASTE(EM_FUNCTION, _gather)(p, x, two ? next_y : oy, two ? next_x : ox, g * group_in, group_in, 1,
                                           space.row);
#endif
            EM_PASTE(EM_FUNCTION, _sums)(&space, space.row, length, w, given != NULL ? given + g * group_out : NULL,
                                            group_out);
            EM_PASTE(EM_FUNCTION, _results)(space.sums, given, epilogue, g * group_out, group_out, y, z);
        }
        y = z + p->out_c;
        ox = next_x;
        oy = next_y;
        if (two) {
            ox = next_x + 1 < p->out_w ? next_x + 1 : 0;
            oy = ox > 0 ? next_y : next_y + 1;
        }
    }
}
#include "edgemat_trits_end.h"
#include "edgemat_variant_end.h"
