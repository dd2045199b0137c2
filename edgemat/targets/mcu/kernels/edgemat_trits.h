/* The inner loops of linear__trits.c and conv__trits.c: weights -1, 0 and +1, EM_TRITS of them to a byte.
 *
 * The sums of a group of EM_TRITS inputs under all patterns of weights are formed once, in a table that the
 * weights' byte indexes, and shared by all outputs: per byte a load, an indexed load and an addition. The
 * tables of EM_TABLES groups are made at a time, so that an output's sum is read and written once for them.
 * No weight is multiplied, and none is unpacked.
 *
 * Weights: passes of EM_TABLES groups, then of 4, 2 and 1 for the groups left; a pass holds, output by output,
 * one byte for each of its groups. The bytes:
 *   EM_TRITS 4: 2 bits a weight, the first in the lowest bits, two's complement; of 256 entries 81 are used.
 *   EM_TRITS 5: with c = (t0+1) + 3*(t1+1) + 9*(t2+1) and b = (t3+1) + 3*(t4+1) it is 14*b + c where c < 14,
 *     else 126 + 14*b + c - 14: two halves of nine blocks of fourteen entries, so that pairs of entries of
 *     16 bits lie in words and blocks follow each other.
 *
 * EM_LANES 2: two rows of inputs at once; a sum is that of the first row plus 65536 times that of the second,
 * modulo 2**32. Both are known to fit 16 bits without their bias; EM_ENTRY_BITS is 32.
 * EM_LANES 1: EM_ENTRY_BITS 16 where no entry reaches EM_OFFSET in magnitude (entries are raised by it, so that
 * a pair of them in a word takes plain additions), else EM_ACC_BITS. Sums are taken modulo 2**EM_ACC_BITS. */
#ifndef EM_TRITS
#define EM_TRITS 5
#endif
#ifndef EM_LANES
#define EM_LANES 1
#endif
#ifndef EM_ENTRY_BITS
#define EM_ENTRY_BITS 16
#endif
#ifndef EM_OFFSET
#define EM_OFFSET 1280
#endif
#ifndef EM_TABLES
#define EM_TABLES 8
#endif

#ifndef EDGEMAT_TRITS_PATTERN
#define EDGEMAT_TRITS_PATTERN
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#define EM_PAIR(first, second) (((uint32_t)(first) << 16) + (uint32_t)(second))
#else
#define EM_PAIR(first, second) ((uint32_t)(first) + ((uint32_t)(second) << 16))
#endif
#endif

#if EM_LANES == 2
#define EM_IN uint32_t
#define EM_TOTAL uint32_t
#else
#define EM_IN EM_X
#define EM_TOTAL EM_PASTE3(uint, EM_ACC_BITS, _t)
#endif
#define EM_ENTRY EM_PASTE3(uint, EM_ENTRY_BITS, _t)
#define EM_ENTRIES (EM_TRITS == 5 ? 252 : 256)
/* A word is what the tables are written by: two entries of 16 bits, or one. */
#if EM_ENTRY_BITS == 16
#define EM_WORD uint32_t
#define EM_BOTH(v) EM_PAIR(v, v)
#else
#define EM_WORD EM_ENTRY
#define EM_BOTH(v) (v)
#endif

typedef union EM_PASTE(EM_FUNCTION, _table) {
    EM_ENTRY entry[EM_ENTRIES];
    EM_WORD word[EM_ENTRY_BITS == 16 ? EM_ENTRIES / 2 : EM_ENTRIES];
} EM_PASTE(EM_FUNCTION, _table);

#if EM_TRITS == 5
/* Nine blocks of seven words, `stride` apart: the first is there, the others add 1 and 2 times d3, 3 and 6
 * times d4. */
static void EM_PASTE(EM_FUNCTION, _spread)(EM_WORD* p, int32_t stride, EM_WORD d3, EM_WORD d4) {
    EM_WORD a = p[0], b = p[1], c = p[2], d = p[3], e = p[4], f = p[5], g = p[6];
    const EM_WORD back = d4 - d3 - d3;
    for (int32_t n = 3; n > 0; --n) {
        p[0] = a, p[1] = b, p[2] = c, p[3] = d, p[4] = e, p[5] = f, p[6] = g;
        p += stride;
        a += d3, b += d3, c += d3, d += d3, e += d3, f += d3, g += d3;
        p[0] = a, p[1] = b, p[2] = c, p[3] = d, p[4] = e, p[5] = f, p[6] = g;
        p += stride;
        a += d3, b += d3, c += d3, d += d3, e += d3, f += d3, g += d3;
        p[0] = a, p[1] = b, p[2] = c, p[3] = d, p[4] = e, p[5] = f, p[6] = g;
        p += stride;
        a += back, b += back, c += back, d += back, e += back, f += back, g += back;
    }
}

static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _fill)(EM_PASTE(EM_FUNCTION, _table) * table, const EM_IN* x) {
    const EM_WORD x0 = (EM_WORD)x[0], x1 = (EM_WORD)x[1], x2 = (EM_WORD)x[2];
    const EM_WORD x3 = (EM_WORD)x[3], x4 = (EM_WORD)x[4];
    EM_WORD* const p = table->word;
#if EM_ENTRY_BITS == 16
    const EM_WORD v = (EM_WORD)EM_OFFSET - x0 - x1 - x2 - x3 - x4, v1 = v + x1, v2 = v1 + x1;
    const EM_WORD u = v + x2, u1 = u + x1, u2 = u1 + x1;
    const EM_WORD d2 = EM_BOTH(x2 + x2);
    EM_WORD* const q = p + 63;
    p[0] = EM_PAIR(v, v + x0);
    p[1] = EM_PAIR(v + x0 + x0, v1);
    p[2] = EM_PAIR(v1 + x0, v1 + x0 + x0);
    p[3] = EM_PAIR(v2, v2 + x0);
    p[4] = EM_PAIR(v2 + x0 + x0, u);
    p[5] = EM_PAIR(u + x0, u + x0 + x0);
    p[6] = EM_PAIR(u1, u1 + x0);
    q[0] = EM_PAIR(u1 + x0 + x0, u2);
    q[1] = EM_PAIR(u2 + x0, u2 + x0 + x0);
    q[2] = p[0] + d2;
    q[3] = p[1] + d2;
    q[4] = p[2] + d2;
    q[5] = p[3] + d2;
    q[6] = EM_PAIR(v2 + x0 + x0, u) + d2;
    EM_PASTE(EM_FUNCTION, _spread)(p, 7, EM_BOTH(x3), EM_BOTH(x4));
    EM_PASTE(EM_FUNCTION, _spread)(q, 7, EM_BOTH(x3), EM_BOTH(x4));
#else
    EM_WORD v = (EM_WORD)0 - x0 - x1 - x2 - x3 - x4;
    for (int32_t c = 0; c < 28; c += 3) {
        EM_WORD* const first = p + (c < 14 ? c : c + 112);
        EM_WORD* const second = p + (c < 13 ? c + 1 : c + 113);
        EM_WORD* const third = p + (c < 12 ? c + 2 : c + 114);
        *first = v;
        if (c < 27) {
            *second = v + x0;
            *third = v + x0 + x0;
        }
        v += c == 6 || c == 15 ? x2 - x1 - x1 : x1;
    }
    EM_PASTE(EM_FUNCTION, _spread)(p, 14, x3, x4);
    EM_PASTE(EM_FUNCTION, _spread)(p + 7, 14, x3, x4);
    EM_PASTE(EM_FUNCTION, _spread)(p + 126, 14, x3, x4);
    EM_PASTE(EM_FUNCTION, _spread)(p + 133, 14, x3, x4);
#endif
}
#else
/* A code of 2 bits is 0, 1 or 3 (-1): steps of +x, then -2x. */
static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _fill)(EM_PASTE(EM_FUNCTION, _table) * table, const EM_IN* x) {
    const EM_WORD x0 = (EM_WORD)x[0], x1 = (EM_WORD)x[1], x2 = EM_BOTH((EM_WORD)x[2]), x3 = EM_BOTH((EM_WORD)x[3]);
    EM_WORD* p = table->word;
#if EM_ENTRY_BITS == 16
    const EM_WORD zero = (EM_WORD)EM_OFFSET;
    const EM_WORD d1 = EM_BOTH(x1);
    EM_WORD a = EM_PAIR(zero, zero + x0), b = EM_PAIR(zero, zero - x0);
    EM_WORD c = a + d1, d = b + d1, e = a - d1, f = b - d1;
    for (int32_t n = 0; n < 3; ++n) {
        p[0] = a, p[1] = b, p[2] = c, p[3] = d, p[6] = e, p[7] = f;
        a += x2, b += x2, c += x2, d += x2, e += x2, f += x2;
        p[8] = a, p[9] = b, p[10] = c, p[11] = d, p[14] = e, p[15] = f;
        a -= x2 + x2, b -= x2 + x2, c -= x2 + x2, d -= x2 + x2, e -= x2 + x2, f -= x2 + x2;
        p[24] = a, p[25] = b, p[26] = c, p[27] = d, p[30] = e, p[31] = f;
        const EM_WORD step = n == 0 ? x2 + x3 : x2 - x3 - x3;
        a += step, b += step, c += step, d += step, e += step, f += step;
        p += n == 0 ? 32 : 64;
    }
#else
    EM_WORD v = 0;
    for (int32_t n = 0; n < 3; ++n) {
        EM_WORD a = v, b = v + x0, c = v - x0;
        EM_WORD* q = p;
        for (int32_t m = 0; m < 3; ++m) {
            q[0] = a, q[1] = b, q[3] = c;
            a += x2, b += x2, c += x2;
            q[16] = a, q[17] = b, q[19] = c;
            a -= x2 + x2, b -= x2 + x2, c -= x2 + x2;
            q[48] = a, q[49] = b, q[51] = c;
            const EM_WORD step = m == 0 ? x2 + x3 : x2 - x3 - x3;
            a += step, b += step, c += step;
            q += m == 0 ? 64 : 128;
        }
        v += n == 0 ? x1 : (EM_WORD)0 - x1 - x1;
        p += n == 0 ? 4 : 8;
    }
#endif
}
#endif

#define EM_AT(k) t##k[w[(k)]]
#define EM_TABLE(k) const EM_ENTRY* const t##k = table[(k)].entry
#define EM_ADD(name, count, declarations, terms)                                                             \
    static EM_NOINLINE void EM_PASTE(EM_FUNCTION, name)(EM_TOTAL * sum, const EM_PASTE(EM_FUNCTION, _table) * table, \
                                                        const uint8_t* w, int32_t outputs) {                 \
        declarations;                                                                                        \
        for (; outputs >= 4; outputs -= 4, sum += 4) {                                                       \
            sum[0] += terms;                                                                                 \
            w += (count);                                                                                    \
            sum[1] += terms;                                                                                 \
            w += (count);                                                                                    \
            sum[2] += terms;                                                                                 \
            w += (count);                                                                                    \
            sum[3] += terms;                                                                                 \
            w += (count);                                                                                    \
        }                                                                                                    \
        for (; outputs > 0; --outputs, ++sum, w += (count)) {                                                \
            *sum += terms;                                                                                   \
        }                                                                                                    \
    }
#define EM_FOUR (EM_TOTAL)((EM_TOTAL)EM_AT(0) + EM_AT(1) + EM_AT(2) + EM_AT(3))
#define EM_EIGHT (EM_TOTAL)(EM_FOUR + EM_AT(4) + EM_AT(5) + EM_AT(6) + EM_AT(7))
EM_ADD(_add1, 1, EM_TABLE(0), EM_AT(0))
EM_ADD(_add2, 2, EM_TABLE(0); EM_TABLE(1), (EM_TOTAL)((EM_TOTAL)EM_AT(0) + EM_AT(1)))
EM_ADD(_add4, 4, EM_TABLE(0); EM_TABLE(1); EM_TABLE(2); EM_TABLE(3), EM_FOUR)
#if EM_TABLES == 8
EM_ADD(_add8, 8, EM_TABLE(0); EM_TABLE(1); EM_TABLE(2); EM_TABLE(3); EM_TABLE(4); EM_TABLE(5); EM_TABLE(6); EM_TABLE(7), EM_EIGHT)
#endif
#undef EM_AT
#undef EM_TABLE
#undef EM_ADD
#undef EM_FOUR
#undef EM_EIGHT

/* Memory of a call, as `scratch` holds it: the tables, a sum for each output of a group, and, in conv__trits.c
 * and with two lanes, a row of inputs. */
typedef struct EM_PASTE(EM_FUNCTION, _space) {
    EM_PASTE(EM_FUNCTION, _table) * table;
    EM_TOTAL* sums;
    EM_IN* row;
} EM_PASTE(EM_FUNCTION, _space);

static EM_PASTE(EM_FUNCTION, _space) EM_PASTE(EM_FUNCTION, _divide)(void* scratch, int32_t outputs) {
    EM_PASTE(EM_FUNCTION, _space) space;
    space.table = (EM_PASTE(EM_FUNCTION, _table)*)scratch;
    space.sums = (EM_TOTAL*)(void*)(space.table + EM_TABLES);
    space.row = (EM_IN*)(void*)(space.sums + outputs);
    return space;
}

/* space->sums of `outputs` outputs of a row of inputs. */
static void EM_PASTE(EM_FUNCTION, _sums)(const EM_PASTE(EM_FUNCTION, _space) * space, const EM_IN* x, int32_t length,
                                         const uint8_t* w, int32_t outputs) {
    int32_t groups = (length + EM_TRITS - 1) / EM_TRITS;
    EM_TOTAL start = 0;
    if (EM_ENTRY_BITS == 16) {
        for (int32_t i = 0; i < groups; ++i) {
            start -= (EM_TOTAL)EM_OFFSET;
        }
    }
    for (int32_t o = 0; o < outputs; ++o) {
        space->sums[o] = start;
    }
    while (groups > 0) {
        const int32_t pass = groups >= EM_TABLES ? EM_TABLES : groups >= 4 ? 4 : groups >= 2 ? 2 : 1;
        for (int32_t i = 0; i < pass; ++i, x += EM_TRITS, length -= EM_TRITS) {
            EM_IN last[EM_TRITS] = {0};
            for (int32_t k = 0; length < EM_TRITS && k < length; ++k) {
                last[k] = x[k];
            }
            EM_PASTE(EM_FUNCTION, _fill)(space->table + i, length < EM_TRITS ? last : x);
        }
#if EM_TABLES == 8
        if (pass == 8) {
            EM_PASTE(EM_FUNCTION, _add8)(space->sums, space->table, w, outputs);
        } else
#endif
            if (pass == 4) {
            EM_PASTE(EM_FUNCTION, _add4)(space->sums, space->table, w, outputs);
        } else if (pass == 2) {
            EM_PASTE(EM_FUNCTION, _add2)(space->sums, space->table, w, outputs);
        } else {
            EM_PASTE(EM_FUNCTION, _add1)(space->sums, space->table, w, outputs);
        }
        for (int32_t i = 0; i < pass; ++i) {
            w += outputs;
        }
        groups -= pass;
    }
}

/* The results first .. first+count-1 of one row, or with two lanes of the rows of y and z. */
static void EM_PASTE(EM_FUNCTION, _results)(const EM_TOTAL* sums, const EM_B* bias, const em_epilogue* epilogue,
                                            int32_t first, int32_t count, EM_Y* y, EM_Y* z) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t i = 0, o = first; i < count; ++i, ++o) {
        const EM_PASTE3(uint, EM_ACC_BITS, _t) start = bias != NULL ? (EM_PASTE3(uint, EM_ACC_BITS, _t))(EM_ACC)bias[o] : 0;
#if EM_LANES == 2
        const int32_t low = (int16_t)(uint16_t)(sums[i] & 0xffffu);
        const int32_t high = (int16_t)(uint16_t)((sums[i] - (uint32_t)low) >> 16);
        z[o] = EM_RESULT((EM_ACC)(start + (EM_PASTE3(uint, EM_ACC_BITS, _t))(EM_ACC)high), o);
        y[o] = EM_RESULT((EM_ACC)(start + (EM_PASTE3(uint, EM_ACC_BITS, _t))(EM_ACC)low), o);
#else
        (void)z;
        y[o] = EM_RESULT((EM_ACC)(start + sums[i]), o);
#endif
    }
}
