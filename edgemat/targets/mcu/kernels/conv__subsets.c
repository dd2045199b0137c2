/* conv.c for weights -1 and +1 and x of any codes, by sums of subsets of inputs (edgemat_subsets.h); a row of
 * weights is [ky][kx][i], taps outside the map count as zero.
 * EM_W is uint32_t. EM_X EM_B EM_ACC_BITS EM_Y EM_WORDS EM_OUTPUTS, epilogue macros. */
#ifndef EM_W
#define EM_W uint32_t
#endif
#ifndef EM_WORDS
#define EM_WORDS 32
#endif
#ifndef EM_OUTPUTS
#define EM_OUTPUTS 32
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_u32_s32__subsets
#endif
#include "edgemat_subsets.h"

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    struct EM_PASTE(EM_FUNCTION, _space) space;
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t length = p->kernel_h * p->kernel_w * group_in;
    const int32_t words = (length + 31) / 32;
    for (int32_t i = length; i < words * 32; ++i) {
        space.row[i] = 0;
    }
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        for (int32_t ox = 0; ox < p->out_w; ++ox, y += p->out_c) {
            for (int32_t g = 0; g < p->groups; ++g) {
                EM_X* to = space.row;
                for (int32_t ky = 0; ky < p->kernel_h; ++ky) {
                    const int32_t iy = oy * p->stride_h - p->pad_top + ky * p->dilation_h;
                    for (int32_t kx = 0; kx < p->kernel_w; ++kx, to += group_in) {
                        const int32_t ix = ox * p->stride_w - p->pad_left + kx * p->dilation_w;
                        const int inside = iy >= 0 && iy < p->in_h && ix >= 0 && ix < p->in_w;
                        const EM_X* from = inside ? x + (iy * p->in_w + ix) * p->in_c + g * group_in : x;
                        for (int32_t i = 0; i < group_in; ++i) {
                            to[i] = (EM_X)(inside ? from[i] : 0);
                        }
                    }
                }
                EM_PASTE(EM_FUNCTION, _outputs)(&space, length, weight + g * group_out * words,
                                                p->has_bias ? bias : NULL, epilogue, g * group_out, group_out,
                                                y);
            }
        }
    }
}
#undef EM_SUBSET_ACC
#include "edgemat_variant_end.h"
#undef EM_WORDS
#undef EM_OUTPUTS
