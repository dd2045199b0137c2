/* Forgets the macros of edgemat_trits.h. */
#undef EM_TRITS
#undef EM_LANES
#undef EM_ENTRY_BITS
#undef EM_OFFSET
#undef EM_TABLES
#undef EM_IN
#undef EM_TOTAL
#undef EM_ENTRY
#undef EM_ENTRIES
#undef EM_WORD
#undef EM_BOTH
#undef EM_BLOCKS
#undef EM_ADD_EIGHT
