/* The transpose of a tensor: a strided copy, see edgemat_strided.h. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_transpose_s8
#endif
#include "edgemat_strided.h"
#include "edgemat_variant_end.h"
