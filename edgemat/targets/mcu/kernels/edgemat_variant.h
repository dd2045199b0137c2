/* Opens a kernel variant: defaults of the template macros and the epilogue in the variant's terms.
 * No include guard: every kernel file includes it first and edgemat_variant_end.h last. */
#include "edgemat_kernels.h"
#include "edgemat_requantize.h"

#define EM_PASTE_(a, b) a##b
#define EM_PASTE(a, b) EM_PASTE_(a, b)
#define EM_PASTE3_(a, b, c) a##b##c
#define EM_PASTE3(a, b, c) EM_PASTE3_(a, b, c)

#ifndef EM_X /* element of the input, and of the first operand */
#define EM_X int8_t
#endif
#ifndef EM_X1 /* element of the second operand */
#define EM_X1 EM_X
#endif
#ifndef EM_W /* element of weights, scales, slopes */
#define EM_W int8_t
#endif
#ifndef EM_B /* element of the bias */
#define EM_B int32_t
#endif
#ifndef EM_ACC_BITS /* 32 or 64 */
#define EM_ACC_BITS 32
#endif
#ifndef EM_SUM_BITS /* 16 where every partial sum of products is proved to fit, else EM_ACC_BITS */
#define EM_SUM_BITS EM_ACC_BITS
#endif
#ifndef EM_Y /* element of the result */
#define EM_Y int32_t
#endif
#ifndef EM_KIND /* EM_SHIFT_NONE, EM_SHIFT_RIGHT or EM_SHIFT_ANY */
#define EM_KIND EM_SHIFT_NONE
#endif
#ifndef EM_ROUNDING
#define EM_ROUNDING EM_TRN
#endif
#ifndef EM_OVERFLOW
#define EM_OVERFLOW EM_FITS
#endif
#ifndef EM_Y_MIN /* code range of the result; under EM_WRAP its size is a power of two */
#define EM_Y_MIN 0
#endif
#ifndef EM_Y_MAX
#define EM_Y_MAX 0
#endif
#ifndef EM_WIDTHS /* 1: the code range is that of epilogue->width[channel] bits, under EM_SAT */
#define EM_WIDTHS 0
#endif
#ifndef EM_RAILS /* EM_RAILS_UNSIGNED, EM_RAILS_SIGNED or EM_RAILS_SYMMETRIC, with EM_WIDTHS */
#define EM_RAILS EM_RAILS_SIGNED
#endif
#ifndef EM_HEADROOM /* 1: the accumulator plus half of any right shift's unit stays inside EM_ACC */
#define EM_HEADROOM 0
#endif
#ifndef EM_PER_CHANNEL /* 1: epilogue->shift has one entry per channel */
#define EM_PER_CHANNEL 0
#endif

#ifndef EM_DIGITS /* 0: weights are codes; K: words of K packed digits (edgemat_shift_add.h) */
#define EM_DIGITS 0
#endif

#ifndef EM_SIGNED /* 1: every weight is -1 or +1, so that a product is x or -x; 2: or 0 */
#define EM_SIGNED 0
#endif

#define EM_ACC EM_PASTE3(int, EM_ACC_BITS, _t)
#define EM_SUM EM_PASTE3(int, EM_SUM_BITS, _t)

/* The product of an input and a constant. */
#if EM_DIGITS > 0
#include "edgemat_shift_add.h"
#define EM_PRODUCT(x, w) \
    EM_PASTE(em_shift_add_s, EM_ACC_BITS)((EM_ACC)(x), (uint32_t)(w), EM_DIGITS, EM_DIGIT_BITS, EM_DIGIT_NONE)
#elif EM_SIGNED == 2
#define EM_PRODUCT(x, w) ((((EM_ACC)(x) & -((EM_ACC)(w) & 1)) ^ ((EM_ACC)(w) >> 1)) - ((EM_ACC)(w) >> 1))
#elif EM_SIGNED
#define EM_PRODUCT(x, w) (((EM_ACC)(x) ^ ((EM_ACC)(w) >> 1)) - ((EM_ACC)(w) >> 1))
#else
#define EM_PRODUCT(x, w) ((EM_ACC)(x) * (EM_ACC)(w))
#endif

/* Loads what every result needs, once; a variant without epilogue does not touch the pointer. */
#define EM_EPILOGUE_BEGIN(e)                                                                     \
    const int8_t* const em_shift EM_MAYBE_UNUSED = EM_KIND == EM_SHIFT_NONE ? NULL : (e)->shift; \
    const uint8_t* const em_width EM_MAYBE_UNUSED = EM_WIDTHS ? (e)->width : NULL;               \
    const int em_shift0 EM_MAYBE_UNUSED = EM_KIND == EM_SHIFT_NONE ? 0 : (e)->shift[0]

/* The code range of channel c. */
#define EM_LOWEST(c) \
    (EM_WIDTHS ? EM_PASTE(em_rail_min_s, EM_ACC_BITS)(em_width[(c)], EM_RAILS) : (EM_ACC)EM_Y_MIN)
#define EM_HIGHEST(c) \
    (EM_WIDTHS ? EM_PASTE(em_rail_max_s, EM_ACC_BITS)(em_width[(c)], EM_RAILS) : (EM_ACC)EM_Y_MAX)

/* The result of accumulator a in channel c. */
#define EM_RESULT(a, c)                                                                              \
    ((EM_Y)EM_PASTE(em_requantize_s, EM_ACC_BITS)((a), EM_PER_CHANNEL ? em_shift[(c)] : em_shift0,   \
                                                  EM_LOWEST(c), EM_HIGHEST(c), EM_KIND, EM_ROUNDING, \
                                                  EM_OVERFLOW, EM_HEADROOM))

/* The channel after c. */
#define EM_NEXT_CHANNEL(e, c) ((EM_PER_CHANNEL || EM_WIDTHS) && (c) + 1 < (e)->channels ? (c) + 1 : 0)

#define EM_SHIFT_LEFT(a, shift) EM_PASTE(em_shift_left_s, EM_ACC_BITS)((a), (shift))
