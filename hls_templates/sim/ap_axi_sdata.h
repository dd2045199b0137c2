// SPDX-License-Identifier: Apache-2.0
// The AXI4-Stream element with its side channels, for C simulation where the vendor's header is absent. Never
// used for synthesis. User, id and destination widths of zero only.
#ifndef EDGEMAT_SIM_AP_AXI_SDATA_H
#define EDGEMAT_SIM_AP_AXI_SDATA_H

#include <ap_int.h>

namespace hls {

template <class T, int USER, int ID, int DEST>
struct axis;

template <int WIDTH>
struct axis<ap_uint<WIDTH>, 0, 0, 0> {
    static_assert(WIDTH % 8 == 0, "an AXI4-Stream word is a whole number of bytes");
    ap_uint<WIDTH> data;
    ap_uint<WIDTH / 8> keep;
    ap_uint<WIDTH / 8> strb;
    ap_uint<1> last;
};

}  // namespace hls

#endif  // EDGEMAT_SIM_AP_AXI_SDATA_H
