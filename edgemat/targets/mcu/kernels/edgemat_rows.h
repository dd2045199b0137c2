/* Opens rms_norm.c and layer_norm.c: what their variants define beyond edgemat_variant.h.
 * No include guard, as there; edgemat_rows_end.h closes. */
#include "edgemat_norm.h"

#ifndef EM_TOTAL_BITS /* 32 or 64: integers on the way to the total of a row; signed, proven to fit */
#define EM_TOTAL_BITS 32
#endif
#ifndef EM_NORM_BITS /* 32 or 64: the product of a numerator and 16 bits; signed, proven to fit */
#define EM_NORM_BITS 32
#endif
#ifndef EM_NORM_ROUNDING
#define EM_NORM_ROUNDING EM_RND
#endif
#ifndef EM_NORM_OVERFLOW
#define EM_NORM_OVERFLOW EM_SAT
#endif

#define EM_TOTAL EM_PASTE3(int, EM_TOTAL_BITS, _t)
#define EM_NORM EM_PASTE3(int, EM_NORM_BITS, _t)

/* Numerator a of a row of scale s, rounded into the norm's format. */
#define EM_NORMALIZED(a, s)                                                                       \
    EM_PASTE(em_requantize_s, EM_NORM_BITS)(                                                      \
        (EM_NORM)(a) * (EM_NORM)(s).mantissa, p->norm_shift + (s).exponent, (EM_NORM)p->norm_min, \
        (EM_NORM)p->norm_max, EM_SHIFT_ANY, EM_NORM_ROUNDING, EM_NORM_OVERFLOW, 0)

/* The result of normalised value z at place i of its row. */
#define EM_SCALED(z, i)                                              \
    ((p->has_gain ? (EM_ACC)(z) * (EM_ACC)gain[(i)] : (EM_ACC)(z)) + \
     (p->has_bias ? (EM_ACC)bias[(i)] : (EM_ACC)0))
