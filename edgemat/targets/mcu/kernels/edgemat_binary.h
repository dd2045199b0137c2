/* Body of the kernels that join two tensors element by element; add.c, sub.c and mul.c define EM_JOIN(a, b).
 * EM_X EM_X1 EM_ACC_BITS EM_Y, epilogue macros. Without broadcast it may run in place over either operand of
 * the result's element size. */
void EM_FUNCTION(const em_binary_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y);
void EM_FUNCTION(const em_binary_params* p, const EM_X* x0, const EM_X1* x1, const em_epilogue* epilogue,
                 EM_Y* y) {
    EM_EPILOGUE_BEGIN(epilogue);
    int32_t channel = 0;
    if (!p->broadcast) {
        for (int32_t i = 0; i < p->size; ++i) {
            const EM_ACC a = EM_SHIFT_LEFT((EM_ACC)x0[i], p->align0);
            const EM_ACC b = EM_SHIFT_LEFT((EM_ACC)x1[i], p->align1);
            y[i] = EM_RESULT(EM_JOIN(a, b), channel);
            channel = EM_NEXT_CHANNEL(epilogue, channel);
        }
        return;
    }
    int32_t at = 0;
    for (int32_t i0 = 0; i0 < p->dims[0]; ++i0) {
        for (int32_t i1 = 0; i1 < p->dims[1]; ++i1) {
            for (int32_t i2 = 0; i2 < p->dims[2]; ++i2) {
                int32_t at0 = i0 * p->stride0[0] + i1 * p->stride0[1] + i2 * p->stride0[2];
                int32_t at1 = i0 * p->stride1[0] + i1 * p->stride1[1] + i2 * p->stride1[2];
                for (int32_t i3 = 0; i3 < p->dims[3]; ++i3) {
                    const EM_ACC a = EM_SHIFT_LEFT((EM_ACC)x0[at0], p->align0);
                    const EM_ACC b = EM_SHIFT_LEFT((EM_ACC)x1[at1], p->align1);
                    y[at++] = EM_RESULT(EM_JOIN(a, b), channel);
                    channel = EM_NEXT_CHANNEL(epilogue, channel);
                    at0 += p->stride0[3];
                    at1 += p->stride1[3];
                }
            }
        }
    }
}
