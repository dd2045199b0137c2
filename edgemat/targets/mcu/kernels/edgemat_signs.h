/* Signs as bits: a bit of 1 is -1, of 0 is +1. Element i of a row is bit i % 32 of word i / 32; a row begins
 * at a word, and the bits behind its last element are 0.
 *
 * Two rows of signs x and w have the product sum  sum x[i]*w[i] = elements - 2 * (bits in which they differ),
 * so that XNOR and a bit count take the place of multiplying and adding. */
#ifndef EDGEMAT_SIGNS_H
#define EDGEMAT_SIGNS_H

#include "edgemat_kernels.h"

/* A row of bits being written. */
typedef struct em_signs {
    uint32_t* word; /* the next word */
    uint32_t held;  /* bits not yet written, the latest one on top */
    int32_t free;   /* bits of `held` not yet used, 1 .. 32 */
} em_signs;

EM_INLINE void em_signs_flush(em_signs* bits) {
    *bits->word++ = bits->held;
    bits->held = 0;
    bits->free = 32;
}

/* Appends the signs of neighbouring codes -1 and +1. */
EM_INLINE void em_signs_append(em_signs* bits, const int8_t* x, int32_t count) {
    while (count > 0) {
        int32_t part = count < bits->free ? count : bits->free;
        uint32_t held = bits->held;
        count -= part;
        bits->free -= part;
        for (; part >= 4; part -= 4, x += 4) {
            held = (held >> 1) | ((uint32_t)(int32_t)x[0] & 0x80000000u);
            held = (held >> 1) | ((uint32_t)(int32_t)x[1] & 0x80000000u);
            held = (held >> 1) | ((uint32_t)(int32_t)x[2] & 0x80000000u);
            held = (held >> 1) | ((uint32_t)(int32_t)x[3] & 0x80000000u);
        }
        for (; part > 0; --part, ++x) {
            held = (held >> 1) | ((uint32_t)(int32_t)*x & 0x80000000u);
        }
        bits->held = held;
        if (bits->free == 0) {
            em_signs_flush(bits);
        }
    }
}

/* Appends `count` equal bits: fill is 0 or 0xffffffff. */
EM_INLINE void em_signs_fill(em_signs* bits, uint32_t fill, int32_t count) {
    while (count > 0) {
        const int32_t part = count < bits->free ? count : bits->free;
        count -= part;
        bits->free -= part;
        bits->held = part == 32 ? fill : (bits->held >> part) | (fill << (32 - part));
        if (bits->free == 0) {
            em_signs_flush(bits);
        }
    }
}

/* Writes what is left of a row. */
EM_INLINE void em_signs_end(em_signs* bits) {
    if (bits->free < 32) {
        bits->held >>= bits->free;
        em_signs_flush(bits);
    }
}

#if (defined(__GNUC__) || defined(__clang__)) && \
    (defined(__POPCNT__) || defined(__riscv_zbb) || defined(__aarch64__))
#define EM_SIGNS_COUNT 1
#else
#define EM_SIGNS_COUNT 0
#endif

/* Counts of set bits, in every byte (0 .. 8). */
EM_INLINE uint32_t em_signs_bytes(uint32_t v) {
    const uint32_t pairs = v - ((v >> 1) & 0x55555555u);
    const uint32_t nibbles = (pairs & 0x33333333u) + ((pairs >> 2) & 0x33333333u);
    return (nibbles + (nibbles >> 4)) & 0x0f0f0f0fu;
}

/* Sum of the bytes (at most 255 each). */
EM_INLINE uint32_t em_signs_total(uint32_t bytes) {
    const uint32_t halves = (bytes & 0x00ff00ffu) + ((bytes >> 8) & 0x00ff00ffu);
    return (halves & 0xffffu) + (halves >> 16);
}

#define EM_SIGNS_AT(i) ((a[i] ^ b[i]) & (masked ? mask[i] : 0xffffffffu))

/* Bits in which rows a and b differ, where the mask has ones. Up to 31 words share the step from bytes to a
 * number (31 * 8 in a byte). */
EM_INLINE uint32_t em_signs_counted(const uint32_t* a, const uint32_t* b, const uint32_t* mask, int masked,
                                    int32_t words) {
    uint32_t total = 0;
#if EM_SIGNS_COUNT
    for (int32_t i = 0; i < words; ++i) {
        total += (uint32_t)__builtin_popcount(EM_SIGNS_AT(i));
    }
#else
    int32_t i = 0;
    while (i < words) {
        const int32_t end = words - i < 31 ? words : i + 31;
        uint32_t bytes = 0;
        for (; i < end; ++i) {
            bytes += em_signs_bytes(EM_SIGNS_AT(i));
        }
        total += em_signs_total(bytes);
    }
#endif
    return total;
}
#undef EM_SIGNS_AT

static EM_NOINLINE EM_MAYBE_UNUSED uint32_t em_signs_differ(const uint32_t* a, const uint32_t* b,
                                                            int32_t words) {
    return em_signs_counted(a, b, a, 0, words);
}

static EM_NOINLINE EM_MAYBE_UNUSED uint32_t em_signs_differ_inside(const uint32_t* a, const uint32_t* b,
                                                                   const uint32_t* mask, int32_t words) {
    return em_signs_counted(a, b, mask, 1, words);
}

#endif /* EDGEMAT_SIGNS_H */
