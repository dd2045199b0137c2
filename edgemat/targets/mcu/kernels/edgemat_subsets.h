/* The inner loops of linear__subsets.c and conv__subsets.c: weights -1 and +1 as rows of bits
 * (edgemat_signs.h), and as in edgemat_minus.h a sum of products is
 *   sum x[i]*w[i] = (sum of all x) - 2 * (sum of those x whose weight is -1).
 *
 * Four inputs have sixteen subsets. Their sums are formed once, and every output looks up the one that four
 * of its bits name, so that 32 weights cost eight additions. Sums are taken modulo 2**EM_ACC_BITS: the result
 * is known to fit.
 *
 * EM_WORDS: words that hold a row of signs, or more. EM_OUTPUTS: outputs of a group, or more. */
#define EM_SUBSET_ACC EM_PASTE3(uint, EM_ACC_BITS, _t)

typedef struct EM_PASTE(EM_FUNCTION, _space) {
    EM_X row[EM_WORDS * 32];         /* the inputs of a row of weights, zeros behind them */
    EM_SUBSET_ACC table[128];        /* of 32 inputs: 16 sums for each four */
    EM_SUBSET_ACC minus[EM_OUTPUTS]; /* sum of those inputs whose weight is -1 */
} EM_PASTE(EM_FUNCTION, _space);

/* The sums of all subsets of each four of 32 inputs. */
static void EM_PASTE(EM_FUNCTION, _fill)(EM_SUBSET_ACC* table, const EM_X* x) {
    for (int32_t n = 0; n < 8; ++n, x += 4, table += 16) {
        const EM_ACC codes[4] = {(EM_ACC)x[0], (EM_ACC)x[1], (EM_ACC)x[2], (EM_ACC)x[3]};
        const EM_SUBSET_ACC a = (EM_SUBSET_ACC)codes[0];
        const EM_SUBSET_ACC b = (EM_SUBSET_ACC)codes[1];
        const EM_SUBSET_ACC c = (EM_SUBSET_ACC)codes[2];
        const EM_SUBSET_ACC d = (EM_SUBSET_ACC)codes[3];
        const EM_SUBSET_ACC low[4] = {0, a, b, a + b};
        for (int32_t i = 0; i < 4; ++i) {
            const EM_SUBSET_ACC with = low[i] + c;
            table[i] = low[i];
            table[4 + i] = with;
            table[8 + i] = low[i] + d;
            table[12 + i] = with + d;
        }
    }
}

/* minus[o] += those of the 32 inputs that the bits of w[o * words] name. */
static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _add)(EM_SUBSET_ACC* minus, const EM_SUBSET_ACC* table,
                                                    const uint32_t* w, int32_t words, int32_t outputs) {
    for (; outputs > 0; --outputs, w += words, ++minus) {
        const uint32_t bits = *w;
        *minus += table[bits & 15u] + table[16u + ((bits >> 4) & 15u)] + table[32u + ((bits >> 8) & 15u)] +
                  table[48u + ((bits >> 12) & 15u)] + table[64u + ((bits >> 16) & 15u)] +
                  table[80u + ((bits >> 20) & 15u)] + table[96u + ((bits >> 24) & 15u)] +
                  table[112u + (bits >> 28)];
    }
}

/* `count` outputs of the row in `space`, whose inputs number `length`. */
static void EM_PASTE(EM_FUNCTION, _outputs)(struct EM_PASTE(EM_FUNCTION, _space) * space, int32_t length,
                                            const uint32_t* w, const EM_B* bias, const em_epilogue* epilogue,
                                            int32_t first, int32_t count, EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    const int32_t words = (length + 31) / 32;
    EM_SUBSET_ACC all = 0;
    for (int32_t i = 0; i < length; ++i) {
        const EM_ACC value = (EM_ACC)space->row[i];
        all += (EM_SUBSET_ACC)value;
    }
    for (int32_t o = 0; o < count; ++o) {
        space->minus[o] = 0;
    }
    for (int32_t at = 0; at < words; ++at) {
        EM_PASTE(EM_FUNCTION, _fill)(space->table, space->row + at * 32);
        EM_PASTE(EM_FUNCTION, _add)(space->minus, space->table, w + at, words, count);
    }
    for (int32_t o = 0; o < count; ++o) {
        const EM_ACC start = bias != NULL ? (EM_ACC)bias[first + o] : 0;
        const EM_ACC a = (EM_ACC)((EM_SUBSET_ACC)start + all - space->minus[o] - space->minus[o]);
        y[first + o] = EM_RESULT(a, first + o);
    }
}
