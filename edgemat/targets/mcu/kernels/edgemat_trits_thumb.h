/* The loops of edgemat_trits.h for Cortex-M3 and up (Thumb-2), where compilers run out of registers: seven
 * words of a table stay in registers from block to block and are stored at once, and the addresses of eight
 * tables stay in registers while weights are looked up. The same integers. */
#ifndef EDGEMAT_TRITS_THUMB_H
#define EDGEMAT_TRITS_THUMB_H

#include "edgemat_kernels.h"

#define EM_THUMB_STORE "stmia %0!, {r3, r4, r5, r6, r8, r10, r12}\n\t"
#define EM_THUMB_BLOCK(gap, by)                                                             \
    gap "add r3, r3, " by "\n\tadd r4, r4, " by "\n\tadd r5, r5, " by "\n\tadd r6, r6, " by \
        "\n\t"                                                                              \
        "add r8, r8, " by "\n\tadd r10, r10, " by "\n\tadd r12, r12, " by "\n\t" EM_THUMB_STORE
#define EM_THUMB_THREE(gap) EM_THUMB_STORE EM_THUMB_BLOCK(gap, "%8") EM_THUMB_BLOCK(gap, "%8")
#define EM_THUMB_NEXT(gap) EM_THUMB_BLOCK(gap, "%9") EM_THUMB_BLOCK(gap, "%8") EM_THUMB_BLOCK(gap, "%8")
#define EM_THUMB_BLOCKS(code)                                                                        \
    __asm__ volatile(code                                                                            \
                     : "+r"(p), "+r"(w0), "+r"(w1), "+r"(w2), "+r"(w3), "+r"(w4), "+r"(w5), "+r"(w6) \
                     : "r"(step), "r"(back)                                                          \
                     : "cc", "memory")

/* Writes `blocks` (3 or 9) blocks of seven words, `gap` (0 or 7) words between them: the words as they are,
 * then with `step`, twice, then with `back`, and so on; leaves the first three words of the last block.
 * Returns the end. */
EM_INLINE uint32_t* em_thumb_blocks(uint32_t* p, int blocks, int gap, uint32_t word[7], uint32_t step,
                                    uint32_t back) {
    register uint32_t w0 __asm__("r3") = word[0];
    register uint32_t w1 __asm__("r4") = word[1];
    register uint32_t w2 __asm__("r5") = word[2];
    register uint32_t w3 __asm__("r6") = word[3];
    register uint32_t w4 __asm__("r8") = word[4];
    register uint32_t w5 __asm__("r10") = word[5];
    register uint32_t w6 __asm__("r12") = word[6];
    if (blocks == 9 && gap > 0) {
        EM_THUMB_BLOCKS(EM_THUMB_THREE("add %0, %0, #28\n\t") EM_THUMB_NEXT("add %0, %0, #28\n\t")
                            EM_THUMB_NEXT("add %0, %0, #28\n\t"));
    } else if (blocks == 9) {
        EM_THUMB_BLOCKS(EM_THUMB_THREE("") EM_THUMB_NEXT("") EM_THUMB_NEXT(""));
    } else if (gap > 0) {
        EM_THUMB_BLOCKS(EM_THUMB_THREE("add %0, %0, #28\n\t"));
    } else {
        EM_THUMB_BLOCKS(EM_THUMB_THREE(""));
    }
    word[0] = w0, word[1] = w1, word[2] = w2;
    return p;
}

#define EM_THUMB_LOOKUP(load, base, shift) \
    "ldrb r12, [r2], #1\n\t" load " r12, [" base ", r12, lsl " shift "]\n\tadd lr, lr, r12\n\t"
#define EM_THUMB_OUTPUT(load, shift)                                                         \
    "ldr lr, [r0]\n\t" EM_THUMB_LOOKUP(load, "r1", shift) EM_THUMB_LOOKUP(load, "r4", shift) \
        EM_THUMB_LOOKUP(load, "r5", shift) EM_THUMB_LOOKUP(load, "r6", shift)                \
            EM_THUMB_LOOKUP(load, "r8", shift) EM_THUMB_LOOKUP(load, "r9", shift)            \
                EM_THUMB_LOOKUP(load, "r10", shift)                                          \
                    EM_THUMB_LOOKUP(load, "r11", shift) "str lr, [r0], #4\n\t"
#define EM_THUMB_OUTPUTS(load, shift) \
    __asm__ volatile(                                                                                   \
        "add r4, r1, %[step]\n\tadd r5, r4, %[step]\n\tadd r6, r5, %[step]\n\tadd r8, r6, %[step]\n\t"  \
        "add r9, r8, %[step]\n\tadd r10, r9, %[step]\n\tadd r11, r10, %[step]\n\t"                      \
        "subs r3, r3, #8\n\tblt 2f\n\t"                                                                 \
        "1:\n\t" EM_THUMB_OUTPUT(load, shift) EM_THUMB_OUTPUT(load, shift) EM_THUMB_OUTPUT(load, shift) \
            EM_THUMB_OUTPUT(load, shift) EM_THUMB_OUTPUT(load, shift) EM_THUMB_OUTPUT(load, shift) \
            EM_THUMB_OUTPUT(load, shift) EM_THUMB_OUTPUT(load, shift)                                                               \
        "subs r3, r3, #8\n\tbge 1b\n\t"                                                                 \
        "2:\n\tadds r3, r3, #8\n\tbeq 4f\n\t"                                                           \
        "3:\n\t" EM_THUMB_OUTPUT(load, shift) "subs r3, r3, #1\n\tbne 3b\n\t"                           \
        "4:\n\t"                                                                                        \
        : "+r"(sum), "+r"(table), "+r"(weight), "+r"(left)                                              \
        : [step] "i"(step)                                                                              \
        : "r4", "r5", "r6", "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory")
#define EM_THUMB_ADD(name, bytes, load, shift)                                                         \
    static EM_NOINLINE EM_MAYBE_UNUSED void name(uint32_t* sums, const void* tables, const uint8_t* w, \
                                                 int32_t outputs) {                                    \
        enum { step = (bytes) };                                                                       \
        register uint32_t* sum __asm__("r0") = sums;                                                   \
        register const void* table __asm__("r1") = tables;                                             \
        register const uint8_t* weight __asm__("r2") = w;                                              \
        register int32_t left __asm__("r3") = outputs;                                                 \
        EM_THUMB_OUTPUTS(load, shift);                                                                 \
    }

/* sums[o] += the entries of eight tables that the next eight bytes name. */
EM_THUMB_ADD(em_thumb_add8_4x16, 168, "ldrh", "#1")
EM_THUMB_ADD(em_thumb_add8_5x16, 504, "ldrh", "#1")
EM_THUMB_ADD(em_thumb_add8_4x32, 336, "ldr", "#2")
EM_THUMB_ADD(em_thumb_add8_5x32, 1008, "ldr", "#2")

#endif /* EDGEMAT_TRITS_THUMB_H */
