/* Closes what edgemat_rows.h opened. */
#undef EM_TOTAL
#undef EM_TOTAL_BITS
#undef EM_NORM
#undef EM_NORM_BITS
#undef EM_NORM_ROUNDING
#undef EM_NORM_OVERFLOW
#undef EM_NORMALIZED
#undef EM_SCALED
