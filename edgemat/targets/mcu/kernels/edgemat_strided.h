/* Body of the kernels that only move: y[i0][i1][i2][i3] = x[offset + sum of i*stride].   EM_X (= EM_Y). */
void EM_FUNCTION(const em_strided_params* p, const EM_X* x, EM_X* y);
void EM_FUNCTION(const em_strided_params* p, const EM_X* x, EM_X* y) {
    for (int32_t i0 = 0; i0 < p->dims[0]; ++i0) {
        for (int32_t i1 = 0; i1 < p->dims[1]; ++i1) {
            for (int32_t i2 = 0; i2 < p->dims[2]; ++i2) {
                int32_t at = p->offset + i0 * p->stride[0] + i1 * p->stride[1] + i2 * p->stride[2];
                for (int32_t i3 = 0; i3 < p->dims[3]; ++i3, at += p->stride[3]) {
                    *y++ = x[at];
                }
            }
        }
    }
}
