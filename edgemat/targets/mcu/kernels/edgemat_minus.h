/* The inner loops of linear__bipolar.c and conv__bipolar.c: with weights -1 and +1 a sum of products is
 *   sum x[i]*w[i] = (sum of all x) - 2 * (sum of those x whose weight is -1),
 * so that the first sum is shared by all outputs and the second one needs no multiplication. Weights are rows
 * of bits (edgemat_signs.h). Sums are taken modulo 2**EM_ACC_BITS: the result is known to fit. */
#define EM_MINUS_ACC EM_PASTE3(uint, EM_ACC_BITS, _t)

/* s + sum of x[0 .. count-1]. */
EM_INLINE EM_MINUS_ACC EM_PASTE(EM_FUNCTION, _all)(EM_MINUS_ACC s, const EM_X* x, int32_t count) {
    for (; count > 0; --count) {
        const EM_ACC value = (EM_ACC)*x++;
        s += (EM_MINUS_ACC)value;
    }
    return s;
}

#define EM_MINUS_TAKE(i)                                                         \
    do {                                                                         \
        const EM_ACC em_value = (EM_ACC)x[(i)];                                  \
        s += (EM_MINUS_ACC)em_value & (0u - (EM_MINUS_ACC)((held >> (i)) & 1u)); \
    } while (0)

/* s + sum of those x[0 .. count-1] whose bit, from bit `first` of row w on, is 1. */
static EM_NOINLINE EM_MINUS_ACC EM_PASTE(EM_FUNCTION, _minus)(EM_MINUS_ACC s, const EM_X* x,
                                                              const uint32_t* w, int32_t first,
                                                              int32_t count) {
    w += first / 32;
    int32_t skipped = first % 32;
    while (count > 0) {
        int32_t part = count < 32 - skipped ? count : 32 - skipped;
        uint32_t held = *w++ >> skipped;
        skipped = 0;
        count -= part;
        for (; part >= 8; part -= 8, x += 8, held >>= 8) {
            EM_MINUS_TAKE(0);
            EM_MINUS_TAKE(1);
            EM_MINUS_TAKE(2);
            EM_MINUS_TAKE(3);
            EM_MINUS_TAKE(4);
            EM_MINUS_TAKE(5);
            EM_MINUS_TAKE(6);
            EM_MINUS_TAKE(7);
        }
        for (; part > 0; --part, ++x, held >>= 1) {
            EM_MINUS_TAKE(0);
        }
    }
    return s;
}
#undef EM_MINUS_TAKE
