/* y[i] = requantize(x0[i] * 2**align0 * x1[i] * 2**align1), with broadcasting.   See edgemat_binary.h. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_mul_s8_s8_s32
#endif
#define EM_JOIN(a, b) ((a) * (b))
#include "edgemat_binary.h"
#include "edgemat_variant_end.h"
