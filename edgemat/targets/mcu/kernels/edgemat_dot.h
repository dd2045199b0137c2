/* The inner loops of linear.c and conv.c.
 *
 * A walk is a sequence of runs of neighbouring inputs: after each run, x and w skip to the next. `_dot4`
 * takes four rows of weights, interleaved, so that one loaded input meets four weights; `_dot1` takes one
 * row. They are functions of their own so that accumulators and pointers stay in registers; inner loops are
 * unrolled by hand. Sums are EM_SUM: int16_t where the file states an accumulator of at most 16 bits, which
 * every partial sum is proved to fit. */
#ifndef EDGEMAT_WALK
#define EDGEMAT_WALK
typedef struct em_walk {
    int32_t runs, length;   /* length: inputs of a run, the same number of weights per row */
    int32_t x_skip, w_skip; /* from the end of a run to the next one; w_skip in weights per row */
} em_walk;
#endif

/* Sums by shifts and additions need the registers that unrolling would take. */
#define EM_BY_FOUR(length) (EM_DIGITS > 0 ? 0 : (length) >> 2)
#define EM_REST(length) (EM_DIGITS > 0 ? (length) : (length) & 3)

#define EM_MEET(value, at)                                     \
    do {                                                       \
        const EM_ACC em_value = (EM_ACC)(value);               \
        a0 = (EM_SUM)(a0 + EM_PRODUCT(em_value, w[(at)]));     \
        a1 = (EM_SUM)(a1 + EM_PRODUCT(em_value, w[(at) + 1])); \
        a2 = (EM_SUM)(a2 + EM_PRODUCT(em_value, w[(at) + 2])); \
        a3 = (EM_SUM)(a3 + EM_PRODUCT(em_value, w[(at) + 3])); \
    } while (0)

/* sums[k] += products with interleaved row k. */
static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _dot4)(EM_SUM* sums, const EM_X* x, const EM_W* w,
                                                     const em_walk* walk) {
    EM_SUM a0 = sums[0];
    EM_SUM a1 = sums[1];
    EM_SUM a2 = sums[2];
    EM_SUM a3 = sums[3];
    for (int32_t runs = walk->runs; runs > 0; --runs) {
        for (int32_t i = EM_BY_FOUR(walk->length); i > 0; --i, x += 4, w += 16) {
            EM_MEET(x[0], 0);
            EM_MEET(x[1], 4);
            EM_MEET(x[2], 8);
            EM_MEET(x[3], 12);
        }
        for (int32_t i = EM_REST(walk->length); i > 0; --i, x += 1, w += 4) {
            EM_MEET(x[0], 0);
        }
        x += walk->x_skip;
        w += walk->w_skip * 4;
    }
    sums[0] = a0;
    sums[1] = a1;
    sums[2] = a2;
    sums[3] = a3;
}

/* a + products with one plain row. */
static EM_NOINLINE EM_SUM EM_PASTE(EM_FUNCTION, _dot1)(EM_SUM a, const EM_X* x, const EM_W* w,
                                                       const em_walk* walk) {
    for (int32_t runs = walk->runs; runs > 0; --runs) {
        for (int32_t i = EM_BY_FOUR(walk->length); i > 0; --i, x += 4, w += 4) {
            a = (EM_SUM)(a + EM_PRODUCT(x[0], w[0]));
            a = (EM_SUM)(a + EM_PRODUCT(x[1], w[1]));
            a = (EM_SUM)(a + EM_PRODUCT(x[2], w[2]));
            a = (EM_SUM)(a + EM_PRODUCT(x[3], w[3]));
        }
        for (int32_t i = EM_REST(walk->length); i > 0; --i, ++x, ++w) {
            a = (EM_SUM)(a + EM_PRODUCT(*x, *w));
        }
        x += walk->x_skip;
        w += walk->w_skip;
    }
    return a;
}
#undef EM_MEET
#undef EM_BY_FOUR
#undef EM_REST

/* Output channels first .. first+count-1 of one position, whose inputs are `rows` walks, x_row and w_row
 * apart: blocks of four rows, where two or three are left one more block of the last four, where one is left
 * that one. */
EM_INLINE const EM_W* EM_PASTE(EM_FUNCTION, _rows)(const em_epilogue* epilogue, const EM_X* x, const EM_W* w,
                                                   const EM_B* bias, const em_walk* walk, int32_t rows,
                                                   int32_t x_row, int32_t w_row, int32_t w_first,
                                                   int32_t row_length, int32_t first, int32_t count,
                                                   EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t end = first + count;
    int32_t o = first;
    while (count >= 4 && o + 1 < end) {
        o = o + 4 <= end ? o : end - 4;
        EM_SUM sums[4] = {0, 0, 0, 0};
        if (bias != NULL) {
            sums[0] = (EM_SUM)bias[o];
            sums[1] = (EM_SUM)bias[o + 1];
            sums[2] = (EM_SUM)bias[o + 2];
            sums[3] = (EM_SUM)bias[o + 3];
        }
        const EM_X* xr = x;
        const EM_W* wr = w + w_first * 4;
        for (int32_t r = rows; r > 0; --r, xr += x_row, wr += w_row * 4) {
            EM_PASTE(EM_FUNCTION, _dot4)(sums, xr, wr, walk);
        }
        y[o] = EM_RESULT(sums[0], o);
        y[o + 1] = EM_RESULT(sums[1], o + 1);
        y[o + 2] = EM_RESULT(sums[2], o + 2);
        y[o + 3] = EM_RESULT(sums[3], o + 3);
        o += 4;
        w += row_length * 4;
    }
    for (; o < end; ++o, w += row_length) {
        EM_SUM sum = bias != NULL ? (EM_SUM)bias[o] : 0;
        const EM_X* xr = x;
        const EM_W* wr = w + w_first;
        for (int32_t r = rows; r > 0; --r, xr += x_row, wr += w_row) {
            sum = EM_PASTE(EM_FUNCTION, _dot1)(sum, xr, wr, walk);
        }
        y[o] = EM_RESULT(sum, o);
    }
    return w;
}
