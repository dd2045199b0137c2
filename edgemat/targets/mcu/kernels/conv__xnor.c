/* conv.c for signs: x codes are -1 and +1, weights rows of bits (edgemat_signs.h), a row being [ky][kx][i].
 * The signs of a window are packed once for all outputs of a group; taps outside the map are left out of the
 * count by a mask. EM_X is int8_t, EM_W uint32_t. EM_B EM_ACC_BITS EM_Y, epilogue macros.
 * EM_WORDS: words that hold a row of kernel_h * kernel_w * in_c / groups signs, or more. */
#include "edgemat_signs.h"
#include "edgemat_window.h"
#ifndef EM_WORDS
#define EM_WORDS 32
#endif
#ifndef EM_W
#define EM_W uint32_t
#endif
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_conv_s8_u32_s32__xnor
#endif

void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y);
void EM_FUNCTION(const em_conv_params* p, const EM_X* x, const EM_W* weight, const EM_B* bias,
                 const em_epilogue* epilogue, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    uint32_t signs[EM_WORDS];
    uint32_t mask[EM_WORDS];
    const int32_t group_in = p->in_c / p->groups;
    const int32_t group_out = p->out_c / p->groups;
    const int32_t row = p->kernel_h * p->kernel_w * group_in;
    const int32_t words = (row + 31) / 32;
    const int joined = p->groups == 1 && p->dilation_w == 1;
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        const em_span ky = em_taps(oy * p->stride_h - p->pad_top, p->dilation_h, p->kernel_h, p->in_h);
        for (int32_t ox = 0; ox < p->out_w; ++ox, y += p->out_c) {
            const em_span kx = em_taps(ox * p->stride_w - p->pad_left, p->dilation_w, p->kernel_w, p->in_w);
            const int32_t taps = kx.end - kx.begin;
            const int32_t inside = (ky.end - ky.begin) * taps * group_in;
            const int32_t before = kx.begin * group_in;
            const int32_t after = (p->kernel_w - kx.end) * group_in;
            if (inside < row) { /* ones where a tap lies inside the map */
                em_signs bits = {mask, 0, 32};
                em_signs_fill(&bits, 0, ky.begin * p->kernel_w * group_in);
                for (int32_t k = ky.begin; k < ky.end; ++k) {
                    em_signs_fill(&bits, 0, before);
                    em_signs_fill(&bits, 0xffffffffu, taps * group_in);
                    em_signs_fill(&bits, 0, after);
                }
                em_signs_fill(&bits, 0, (p->kernel_h - ky.end) * p->kernel_w * group_in);
                em_signs_end(&bits);
            }
            const EM_X* origin = x + (ky.first * p->in_w + kx.first) * p->in_c;
            const EM_W* w = weight;
            for (int32_t first = 0; first < p->out_c; first += group_out, origin += group_in) {
                em_signs bits = {signs, 0, 32};
                const EM_X* xr = origin;
                em_signs_fill(&bits, 0, ky.begin * p->kernel_w * group_in);
                for (int32_t k = ky.begin; k < ky.end; ++k, xr += p->dilation_h * p->in_w * p->in_c) {
                    em_signs_fill(&bits, 0, before);
                    if (joined) {
                        em_signs_append(&bits, xr, taps * group_in);
                    } else {
                        for (int32_t t = 0; t < taps; ++t) {
                            em_signs_append(&bits, xr + t * p->dilation_w * p->in_c, group_in);
                        }
                    }
                    em_signs_fill(&bits, 0, after);
                }
                em_signs_fill(&bits, 0, (p->kernel_h - ky.end) * p->kernel_w * group_in);
                em_signs_end(&bits);
                for (int32_t o = first; o < first + group_out; ++o, w += words) {
                    const uint32_t differ = inside < row ? em_signs_differ_inside(signs, w, mask, words)
                                                         : em_signs_differ(signs, w, words);
                    const EM_ACC start = (p->has_bias ? (EM_ACC)bias[o] : 0) + (EM_ACC)inside;
                    const EM_ACC a = start - 2 * (EM_ACC)differ;
                    y[o] = EM_RESULT(a, o);
                }
            }
        }
    }
}
#include "edgemat_variant_end.h"
#undef EM_WORDS
