/* conv.c for weights -1, 0 and +1 in bytes of EM_TRITS, by tables of sums (edgemat_trits.h, which states the
 * macros EM_TRITS EM_LANES EM_ENTRY_BITS EM_OFFSET EM_TABLES and the layout of the weights); a row of weights
 * is [ky][kx][i], taps outside the map count as zero. With two lanes, two neighbouring positions at a time.
 * EM_W is uint8_t. EM_X EM_B EM_ACC_BITS EM_Y, epilogue macros.
 *
 * scratch: aligned to 8 bytes; EM_TABLES tables of 84 (EM_TRITS 4) or 252 entries, one sum for each output of
 * a group, one input (a word with two lanes) for each weight of an output. */
#ifndef EM_W
#define EM_W uint8_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_u8_s32__trits
#endif
#include "edgemat_trits.h"

/* A run of inputs at a and, with two lanes, at b; NULL lies outside the map and counts as zero. Returns the
 * end of the row. */
static EM_NOINLINE EM_IN* EM_PASTE(EM_FUNCTION, _run)(EM_IN* row, const EM_X* a, const EM_X* b,
                                                      int32_t count) {
#if EM_LANES == 2
    if (a != NULL && b != NULL) {
        for (; count >= 4; count -= 4, a += 4, b += 4, row += 4) {
            const int32_t a0 = a[0], b0 = b[0], a1 = a[1], b1 = b[1], a2 = a[2], b2 = b[2], a3 = a[3],
                          b3 = b[3];
            row[0] = (uint32_t)a0 + ((uint32_t)b0 << 16);
            row[1] = (uint32_t)a1 + ((uint32_t)b1 << 16);
            row[2] = (uint32_t)a2 + ((uint32_t)b2 << 16);
            row[3] = (uint32_t)a3 + ((uint32_t)b3 << 16);
        }
    }
    for (int32_t i = 0; i < count; ++i, ++row) {
        const int32_t first = a != NULL ? a[i] : 0, second = b != NULL ? b[i] : 0;
        *row = (uint32_t)first + ((uint32_t)second << 16);
    }
#else
    (void)b;
    for (int32_t i = 0; i < count; ++i, ++row) {
        *row = (EM_X)(a != NULL ? a[i] : 0);
    }
#endif
    return row;
}

/* The inputs of the window at (oy, ox) and, with two lanes, of that at (qy, qx): `count` channels of each
 * tap, from x on. */
static void EM_PASTE(EM_FUNCTION, _gather)(const em_conv_params* p, const EM_X* x, int32_t oy, int32_t ox,
                                           int32_t qy, int32_t qx, int32_t count, EM_IN* row) {
    const int32_t left = ox * p->stride_w - p->pad_left, right = qx * p->stride_w - p->pad_left;
    const int32_t reach = p->in_w - p->kernel_w;
    const int joined =
        p->groups == 1 && p->dilation_w == 1 && left >= 0 && left <= reach && right >= 0 && right <= reach;
    for (int32_t ky = 0; ky < p->kernel_h; ++ky) {
        const int32_t y0 = oy * p->stride_h - p->pad_top + ky * p->dilation_h;
        const int32_t y1 = qy * p->stride_h - p->pad_top + ky * p->dilation_h;
        const int in0 = y0 >= 0 && y0 < p->in_h, in1 = y1 >= 0 && y1 < p->in_h;
        if (joined) {
            row = EM_PASTE(EM_FUNCTION, _run)(row, in0 ? x + (y0 * p->in_w + left) * p->in_c : NULL,
                                              in1 ? x + (y1 * p->in_w + right) * p->in_c : NULL,
                                              p->kernel_w * count);
            continue;
        }
        for (int32_t kx = 0; kx < p->kernel_w; ++kx) {
            const int32_t x0 = left + kx * p->dilation_w, x1 = right + kx * p->dilation_w;
            const EM_X* const a = in0 && x0 >= 0 && x0 < p->in_w ? x + (y0 * p->in_w + x0) * p->in_c : NULL;
            const EM_X* const b = in1 && x1 >= 0 && x1 < p->in_w ? x + (y1 * p->in_w + x1) * p->in_c : NULL;
            row = EM_PASTE(EM_FUNCTION, _run)(row, a, b, count);
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
            EM_PASTE(EM_FUNCTION, _gather)(p, x + g * group_in, oy, ox, two ? next_y : oy, two ? next_x : ox,
                                           group_in, space.row);
            EM_PASTE(EM_FUNCTION, _sums)(&space, space.row, length, w,
                                         given != NULL ? given + g * group_out : NULL, group_out);
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
