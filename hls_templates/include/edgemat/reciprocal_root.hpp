// SPDX-License-Identifier: Apache-2.0
// The integer reciprocal square root of rms_norm.hpp and layer_norm.hpp: a shift, a table, one Newton step.
#ifndef EDGEMAT_RECIPROCAL_ROOT_HPP
#define EDGEMAT_RECIPROCAL_ROOT_HPP

#include "edgemat/types.hpp"

namespace edgemat {

// 2**15 / sqrt((i + 64 + 1/2) / 256), rounded.
inline ap_uint<16> root_entry(int i) {
#pragma HLS INLINE
    static const unsigned short table[192] = {
        65281, 64781, 64292, 63814, 63347, 62889, 62442, 62004, 61575, 61154, 60742, 60339, 59943, 59555,
        59175, 58801, 58435, 58075, 57722, 57376, 57035, 56700, 56372, 56049, 55731, 55419, 55112, 54810,
        54513, 54221, 53933, 53650, 53371, 53097, 52826, 52560, 52298, 52040, 51785, 51535, 51288, 51044,
        50804, 50567, 50333, 50103, 49876, 49652, 49430, 49212, 48997, 48784, 48574, 48367, 48163, 47961,
        47761, 47564, 47370, 47178, 46988, 46800, 46615, 46432, 46251, 46072, 45895, 45720, 45547, 45376,
        45207, 45040, 44875, 44711, 44550, 44390, 44232, 44075, 43920, 43767, 43615, 43465, 43316, 43169,
        43024, 42879, 42737, 42595, 42456, 42317, 42180, 42044, 41910, 41776, 41644, 41514, 41384, 41256,
        41129, 41003, 40878, 40754, 40631, 40510, 40390, 40270, 40152, 40035, 39919, 39803, 39689, 39576,
        39464, 39352, 39242, 39133, 39024, 38916, 38810, 38704, 38599, 38494, 38391, 38289, 38187, 38086,
        37986, 37887, 37788, 37690, 37593, 37497, 37401, 37307, 37213, 37119, 37027, 36935, 36843, 36753,
        36663, 36573, 36485, 36397, 36309, 36222, 36136, 36051, 35966, 35882, 35798, 35715, 35632, 35550,
        35469, 35388, 35307, 35228, 35148, 35070, 34991, 34914, 34837, 34760, 34684, 34608, 34533, 34458,
        34384, 34310, 34237, 34164, 34092, 34020, 33949, 33878, 33807, 33737, 33668, 33599, 33530, 33461,
        33393, 33326, 33259, 33192, 33126, 33060, 32994, 32929, 32864, 32800};
    return table[i];
}

// mantissa * 2**-(15 + exponent): 16 bits of mantissa, within 2**-14 relatively.
struct scale {
    ap_uint<16> mantissa;
    int exponent;
};

// root * 2**-30 / sqrt(total).
// \tparam TOTAL_BITS    bits of `total`, which 1 stands for where it is 0
// \tparam EXPONENT_MAX  total < 4**EXPONENT_MAX
// \param root  in [2**30, 2**31)
template <int TOTAL_BITS, int EXPONENT_MAX>
inline scale reciprocal_root(ap_uint<TOTAL_BITS> total, ap_uint<31> root) {
    const int width = TOTAL_BITS > 30 ? TOTAL_BITS : 30;
    ap_uint<width> normal = total;
    if (total == 0) normal = 1;
    int exponent = 1;
    for (int j = 1; j < EXPONENT_MAX; j++) {
#pragma HLS UNROLL
        if ((normal >> (2 * j)) != 0) exponent = j + 1;
    }
    if (exponent <= 15) {
        normal = normal << (30 - 2 * exponent);
    } else {
        normal = normal >> (2 * exponent - 30);
    }
    const ap_uint<30> u = normal;
    const ap_uint<16> a = root_entry(int(ap_uint<8>(u >> 22)) - 64);
    const ap_uint<32> square = ap_uint<32>(a) * ap_uint<32>(a);
    const ap_uint<62> whole = ap_uint<62>(square) * ap_uint<62>(u);
    const ap_uint<32> rest = ap_uint<32>(3221225472U) - ap_uint<32>(whole >> 30);
    const ap_uint<48> step = ap_uint<48>(a) * ap_uint<48>(rest);
    const ap_uint<32> b = step >> 16;
    const ap_uint<63> product = ap_uint<63>(b) * ap_uint<63>(root);
    const int doubled = (product >> 61) != 0 ? 1 : 0;
    scale made;
    made.mantissa = ap_uint<16>(product >> (45 + doubled));
    made.exponent = exponent - doubled;
    return made;
}

}  // namespace edgemat

#endif  // EDGEMAT_RECIPROCAL_ROOT_HPP
