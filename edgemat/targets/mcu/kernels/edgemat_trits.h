/* The inner loops of linear__trits.c and conv__trits.c: weights -1, 0 and +1, EM_TRITS of them to a byte.
 *
 * The sums of a group of EM_TRITS inputs under all patterns of weights are formed once, in a table that the
 * weights' byte indexes, and shared by all outputs: per byte a load, an indexed load and an addition. The
 * tables of EM_TABLES groups are made at a time, so that an output's sum is read and written once for them.
 * No weight is multiplied, and none is unpacked.
 *
 * Weights: passes of EM_TABLES groups, then of 4, 2 and 1 for the groups left; a pass holds, output by
 * output, one byte for each of its groups. With c = (t0+1) + 3*(t1+1) + 9*(t2+1) of the first three weights,
 * and b = t3+1 of four or (t3+1) + 3*(t4+1) of five, the byte is 14*b + c where c < 14, else 14*(blocks + b)
 * + c - 14 (blocks: 3 or 9). So a table is two halves of blocks of fourteen entries; in a half each block is
 * the first one and a constant.
 *
 * EM_LANES 2: two rows of inputs at once; a sum is that of the first row plus 65536 times that of the second,
 * modulo 2**32. Both are known to fit 16 bits without their bias; EM_ENTRY_BITS is 32.
 * EM_LANES 1: EM_ENTRY_BITS 16 where no entry reaches EM_OFFSET in magnitude (entries are raised by it, so
 * that a pair of them in a word takes plain additions), else EM_ACC_BITS. Sums are taken modulo
 * 2**EM_ACC_BITS. */
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
#if defined(__thumb2__) && (defined(__GNUC__) || defined(__clang__))
#include "edgemat_trits_thumb.h"
#define EM_THUMB 1
#else
#define EM_THUMB 0
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#define EM_PAIR(first, second) (((uint32_t)(first) << 16) + (uint32_t)(second))
#else
#define EM_PAIR(first, second) ((uint32_t)(first) + ((uint32_t)(second) << 16))
#endif
/* Keeps a value in its register: compilers else replace a chain of additions by many values held at once. */
#if defined(__GNUC__) || defined(__clang__)
#define EM_KEEP(v) __asm__("" : "+r"(v))
#else
#define EM_KEEP(v) ((void)(v))
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
#define EM_BLOCKS (EM_TRITS == 5 ? 9 : 3)
#define EM_ENTRIES (28 * EM_BLOCKS)
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

/* Writes the blocks of seven words that begin with `word`, and leaves the first three words of the last one.
 */
#if EM_THUMB && EM_ENTRY_BITS <= 32
EM_INLINE EM_WORD* EM_PASTE(EM_FUNCTION, _blocks)(EM_WORD* p, EM_WORD* word, EM_WORD step, EM_WORD back) {
    return em_thumb_blocks(p, EM_BLOCKS, EM_ENTRY_BITS == 16 ? 0 : 7, word, step, back);
}
#else
#define EM_STORE                                                              \
    do {                                                                      \
        p[0] = a, p[1] = b, p[2] = c, p[3] = d, p[4] = e, p[5] = f, p[6] = g; \
        p += EM_ENTRY_BITS == 16 ? 7 : 14;                                    \
    } while (0)
#define EM_STEP(by)                                                                  \
    do {                                                                             \
        a += (by), b += (by), c += (by), d += (by), e += (by), f += (by), g += (by); \
        EM_KEEP(a);                                                                  \
        EM_KEEP(b);                                                                  \
        EM_KEEP(c);                                                                  \
        EM_KEEP(d);                                                                  \
        EM_KEEP(e);                                                                  \
        EM_KEEP(f);                                                                  \
        EM_KEEP(g);                                                                  \
    } while (0)

EM_INLINE EM_WORD* EM_PASTE(EM_FUNCTION, _blocks)(EM_WORD* p, EM_WORD* word, EM_WORD step, EM_WORD back) {
    EM_WORD a = word[0], b = word[1], c = word[2], d = word[3], e = word[4], f = word[5], g = word[6];
    for (int32_t n = EM_BLOCKS / 3;;) {
        EM_STORE;
        EM_STEP(step);
        EM_STORE;
        EM_STEP(step);
        EM_STORE;
        if (--n == 0) {
            break;
        }
        EM_STEP(back);
    }
    word[0] = a, word[1] = b, word[2] = c;
    return p;
}
#undef EM_STORE
#undef EM_STEP
#endif

/* The tables of `count` groups. */
static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _fill)(EM_PASTE(EM_FUNCTION, _table) * table, const EM_IN* x,
                                                     int32_t count) {
    EM_WORD* p = table->word;
    for (; count > 0; --count, x += EM_TRITS) {
        const EM_WORD x0 = (EM_WORD)x[0], x1 = (EM_WORD)x[1], x2 = (EM_WORD)x[2];
        const EM_WORD d1 = EM_BOTH(x1), d2 = EM_BOTH(x2), d3 = EM_BOTH((EM_WORD)x[3]);
        const EM_WORD d4 = EM_BOTH((EM_WORD)(EM_TRITS == 5 ? x[EM_TRITS - 1] : 0));
        const EM_WORD back = d4 - d3 - d3;
        const EM_WORD d12 = d1 + d2;
#if EM_ENTRY_BITS == 16
        const EM_WORD d0 = EM_BOTH(x0), v = EM_BOTH((EM_WORD)EM_OFFSET) - d0 - d12 - d3 - d4;
        const EM_WORD a = v + EM_PAIR(0, x0), b = v + EM_PAIR(x0 + x0, x1), c = a + d0 + d1;
        const EM_WORD s = v + EM_PAIR(x0 + x0 + x1 + x1, x2);
        const EM_WORD last = d3 + d3 + d4 + d4; /* what the last block adds to the first */
        const EM_WORD one = d12 - last, two = d2 + d2 - last, three = d12 + one;
        EM_WORD w[7] = {a, b, c, a + d1 + d1, s, c + d2 - d1, a + d12};
        p = EM_PASTE(EM_FUNCTION, _blocks)(p, w, d3, back);
        EM_WORD h[7] = {w[1] + one, w[2] + one,   w[0] + two,  w[1] + two,
                        w[2] + two, w[0] + three, w[1] + three};
        p = EM_PASTE(EM_FUNCTION, _blocks)(p, h, d3, back);
#else
        const EM_WORD u = (EM_WORD)0 - x0 - d12 - d3 - d4, v = u + x2, w = v + x2, xx = x0 + x0;
        EM_WORD first[7] = {u, u + x0, u + xx, u + x1, u + x1 + x0, u + x1 + xx, u + x1 + x1};
        const EM_WORD u2 = u + x1 + x1;
        (void)EM_PASTE(EM_FUNCTION, _blocks)(p, first, d3, back);
        EM_WORD second[7] = {u2 + x0, u2 + xx, v, v + x0, v + xx, v + x1, v + x1 + x0};
        (void)EM_PASTE(EM_FUNCTION, _blocks)(p + 7, second, d3, back);
        p += EM_ENTRIES / 2;
        const EM_WORD v2 = v + x1 + x1;
        EM_WORD third[7] = {v + x1 + xx, v2, v2 + x0, v2 + xx, w, w + x0, w + xx};
        (void)EM_PASTE(EM_FUNCTION, _blocks)(p, third, d3, back);
        const EM_WORD w1 = w + x1, w2 = w1 + x1;
        EM_WORD fourth[7] = {w1, w1 + x0, w1 + xx, w2, w2 + x0, w2 + xx, w2};
        (void)EM_PASTE(EM_FUNCTION, _blocks)(p + 7, fourth, d3, back);
        p += EM_ENTRIES / 2;
#endif
    }
}

#define EM_AT(k) t##k[w[(k)]]
#define EM_TABLE(k) const EM_ENTRY* const t##k = table[(k)].entry
#define EM_ADD(name, count, declarations, terms)                                                          \
    static EM_NOINLINE void EM_PASTE(EM_FUNCTION, name)(                                                  \
        EM_TOTAL * sum, const EM_PASTE(EM_FUNCTION, _table) * table, const uint8_t* w, int32_t outputs) { \
        declarations;                                                                                     \
        for (; outputs >= 4; outputs -= 4, sum += 4) {                                                    \
            sum[0] += terms;                                                                              \
            w += (count);                                                                                 \
            sum[1] += terms;                                                                              \
            w += (count);                                                                                 \
            sum[2] += terms;                                                                              \
            w += (count);                                                                                 \
            sum[3] += terms;                                                                              \
            w += (count);                                                                                 \
        }                                                                                                 \
        for (; outputs > 0; --outputs, ++sum, w += (count)) {                                             \
            *sum += terms;                                                                                \
        }                                                                                                 \
    }
#define EM_FOUR (EM_TOTAL)((EM_TOTAL)EM_AT(0) + EM_AT(1) + EM_AT(2) + EM_AT(3))
#define EM_EIGHT (EM_TOTAL)(EM_FOUR + EM_AT(4) + EM_AT(5) + EM_AT(6) + EM_AT(7))
EM_ADD(_add1, 1, EM_TABLE(0), EM_AT(0))
EM_ADD(_add2, 2, EM_TABLE(0); EM_TABLE(1), (EM_TOTAL)((EM_TOTAL)EM_AT(0) + EM_AT(1)))
EM_ADD(_add4, 4, EM_TABLE(0); EM_TABLE(1); EM_TABLE(2); EM_TABLE(3), EM_FOUR)
#if EM_THUMB && EM_TABLES == 8 && EM_ENTRY_BITS <= 32 && (EM_LANES == 2 || EM_ACC_BITS == 32)
#define EM_ADD_EIGHT EM_PASTE(em_thumb_add8_, EM_PASTE3(EM_TRITS, x, EM_ENTRY_BITS))
#elif EM_TABLES == 8
#define EM_ADD_EIGHT EM_PASTE(EM_FUNCTION, _add8)
EM_ADD(_add8, 8, EM_TABLE(0); EM_TABLE(1); EM_TABLE(2); EM_TABLE(3); EM_TABLE(4); EM_TABLE(5); EM_TABLE(6);
       EM_TABLE(7), EM_EIGHT)
#endif
#undef EM_AT
#undef EM_TABLE
#undef EM_ADD
#undef EM_FOUR
#undef EM_EIGHT

/* Memory of a call, as `scratch` holds it: the tables, a sum for each output of a group, and, in
 * conv__trits.c and with two lanes, a row of inputs. */
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
static void EM_PASTE(EM_FUNCTION, _sums)(const EM_PASTE(EM_FUNCTION, _space) * space, const EM_IN* x,
                                         int32_t length, const uint8_t* w, const EM_B* bias,
                                         int32_t outputs) {
    int32_t groups = (length + EM_TRITS - 1) / EM_TRITS;
    EM_TOTAL start = 0;
    if (EM_ENTRY_BITS == 16) {
        for (int32_t i = 0; i < groups; ++i) {
            start -= (EM_TOTAL)EM_OFFSET;
        }
    }
    if (EM_LANES == 1 && bias != NULL) {
        for (int32_t o = 0; o < outputs; ++o) {
            space->sums[o] = start + (EM_TOTAL)(EM_ACC)bias[o];
        }
    } else {
        for (int32_t o = 0; o < outputs; ++o) {
            space->sums[o] = start;
        }
    }
    while (groups > 0) {
        const int32_t pass = groups >= EM_TABLES ? EM_TABLES : groups >= 4 ? 4 : groups >= 2 ? 2 : 1;
        const int32_t whole = length >= pass * EM_TRITS ? pass : pass - 1;
        EM_PASTE(EM_FUNCTION, _fill)(space->table, x, whole);
        x += whole * EM_TRITS;
        length -= whole * EM_TRITS;
        if (whole < pass) {
            EM_IN last[EM_TRITS] = {0};
            for (int32_t k = 0; k < length; ++k) {
                last[k] = x[k];
            }
            EM_PASTE(EM_FUNCTION, _fill)(space->table + whole, last, 1);
        }
#if EM_TABLES == 8
        if (pass == 8) {
            EM_ADD_EIGHT(space->sums, space->table, w, outputs);
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

/* The results first .. first+count-1 of one row, or with two lanes (whose sums are without bias) of those of
 * y and z. */
static void EM_PASTE(EM_FUNCTION, _results)(const EM_TOTAL* sums, const EM_B* bias,
                                            const em_epilogue* epilogue, int32_t first, int32_t count,
                                            EM_Y* y, EM_Y* z) {
    EM_EPILOGUE_BEGIN(epilogue);
    for (int32_t i = 0, o = first; i < count; ++i, ++o) {
#if EM_LANES == 2
        const EM_ACC start = bias != NULL ? (EM_ACC)bias[o] : 0;
        const int32_t low = (int16_t)(uint16_t)(sums[i] & 0xffffu);
        const int32_t high = (int16_t)(uint16_t)((sums[i] - (uint32_t)low) >> 16);
        z[o] = EM_RESULT(start + (EM_ACC)high, o);
        y[o] = EM_RESULT(start + (EM_ACC)low, o);
#else
        (void)bias;
        (void)z;
        y[o] = EM_RESULT((EM_ACC)sums[i], o);
#endif
    }
}
