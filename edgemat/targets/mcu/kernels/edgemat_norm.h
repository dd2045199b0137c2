/* The integer reciprocal square root of rms_norm.c and layer_norm.c (docs/normalization.md).
 *
 * root * 2**-30 / sqrt(total) = mantissa * 2**-(15 + exponent), 16 bits of mantissa, within 2**-14
 * relatively. */
#ifndef EDGEMAT_NORM_H
#define EDGEMAT_NORM_H

#include "edgemat_kernels.h"

/* Entry i - 64: 2**15 / sqrt((i + 1/2) / 256), rounded. */
static const uint16_t em_root_table[192] = {
    65281, 64781, 64292, 63814, 63347, 62889, 62442, 62004, 61575, 61154, 60742, 60339, 59943, 59555, 59175,
    58801, 58435, 58075, 57722, 57376, 57035, 56700, 56372, 56049, 55731, 55419, 55112, 54810, 54513, 54221,
    53933, 53650, 53371, 53097, 52826, 52560, 52298, 52040, 51785, 51535, 51288, 51044, 50804, 50567, 50333,
    50103, 49876, 49652, 49430, 49212, 48997, 48784, 48574, 48367, 48163, 47961, 47761, 47564, 47370, 47178,
    46988, 46800, 46615, 46432, 46251, 46072, 45895, 45720, 45547, 45376, 45207, 45040, 44875, 44711, 44550,
    44390, 44232, 44075, 43920, 43767, 43615, 43465, 43316, 43169, 43024, 42879, 42737, 42595, 42456, 42317,
    42180, 42044, 41910, 41776, 41644, 41514, 41384, 41256, 41129, 41003, 40878, 40754, 40631, 40510, 40390,
    40270, 40152, 40035, 39919, 39803, 39689, 39576, 39464, 39352, 39242, 39133, 39024, 38916, 38810, 38704,
    38599, 38494, 38391, 38289, 38187, 38086, 37986, 37887, 37788, 37690, 37593, 37497, 37401, 37307, 37213,
    37119, 37027, 36935, 36843, 36753, 36663, 36573, 36485, 36397, 36309, 36222, 36136, 36051, 35966, 35882,
    35798, 35715, 35632, 35550, 35469, 35388, 35307, 35228, 35148, 35070, 34991, 34914, 34837, 34760, 34684,
    34608, 34533, 34458, 34384, 34310, 34237, 34164, 34092, 34020, 33949, 33878, 33807, 33737, 33668, 33599,
    33530, 33461, 33393, 33326, 33259, 33192, 33126, 33060, 32994, 32929, 32864, 32800};

typedef struct em_scale {
    int32_t mantissa; /* 2**15 - 1 to 2**16 - 1 */
    int exponent;
} em_scale;

/* total below 2**62 (0 counts as 1), root in [2**30, 2**31). */
EM_INLINE em_scale em_reciprocal_root(uint64_t total, uint32_t root) {
    int exponent = 0; /* 4**(exponent - 1) <= total < 4**exponent */
    if (total == 0) {
        total = 1;
    }
    for (uint64_t rest = total; rest != 0; rest >>= 2) {
        ++exponent;
    }
    const int shift = 30 - 2 * exponent;
    const uint32_t u = (uint32_t)(shift >= 0 ? total << shift : total >> -shift);
    const uint32_t a = em_root_table[(u >> 22) - 64];
    const uint32_t t = (uint32_t)(((uint64_t)(a * a) * u) >> 30);
    const uint32_t b = (uint32_t)(((uint64_t)a * ((3u << 30) - t)) >> 16);
    const uint64_t product = (uint64_t)b * root;
    const int doubled = (int)(product >> 61);
    em_scale scale;
    scale.mantissa = (int32_t)(product >> (45 + doubled));
    scale.exponent = exponent - doubled;
    return scale;
}

#endif /* EDGEMAT_NORM_H */
