/* The inner loops of linear.c and conv.c: four rows of interleaved weights meet every input once.
 *
 * sums[k] += sum over t < runs, i < length of x[t * x_step + i] * w[t * w_step + 4*i + k],  k = 0 .. 3
 *
 * It is a function of its own so that four accumulators, two pointers and the loop's end stay in registers;
 * the inner loop is unrolled four times by hand. */
static EM_NOINLINE void EM_PASTE(EM_FUNCTION, _dot)(EM_ACC* sums, const EM_X* x, const EM_W* w,
                                                    int32_t length, int32_t runs, int32_t x_step,
                                                    int32_t w_step) {
    EM_ACC a0 = sums[0];
    EM_ACC a1 = sums[1];
    EM_ACC a2 = sums[2];
    EM_ACC a3 = sums[3];
    for (; runs > 0; --runs, x += x_step, w += w_step) {
        const EM_X* xi = x;
        const EM_W* wi = w;
        const EM_X* const end4 = x + (length & ~3);
        const EM_X* const end = x + length;
        for (; xi != end4; xi += 4, wi += 16) {
            const EM_ACC v0 = (EM_ACC)xi[0];
            a0 += v0 * (EM_ACC)wi[0];
            a1 += v0 * (EM_ACC)wi[1];
            a2 += v0 * (EM_ACC)wi[2];
            a3 += v0 * (EM_ACC)wi[3];
            const EM_ACC v1 = (EM_ACC)xi[1];
            a0 += v1 * (EM_ACC)wi[4];
            a1 += v1 * (EM_ACC)wi[5];
            a2 += v1 * (EM_ACC)wi[6];
            a3 += v1 * (EM_ACC)wi[7];
            const EM_ACC v2 = (EM_ACC)xi[2];
            a0 += v2 * (EM_ACC)wi[8];
            a1 += v2 * (EM_ACC)wi[9];
            a2 += v2 * (EM_ACC)wi[10];
            a3 += v2 * (EM_ACC)wi[11];
            const EM_ACC v3 = (EM_ACC)xi[3];
            a0 += v3 * (EM_ACC)wi[12];
            a1 += v3 * (EM_ACC)wi[13];
            a2 += v3 * (EM_ACC)wi[14];
            a3 += v3 * (EM_ACC)wi[15];
        }
        for (; xi != end; ++xi, wi += 4) {
            const EM_ACC v = (EM_ACC)*xi;
            a0 += v * (EM_ACC)wi[0];
            a1 += v * (EM_ACC)wi[1];
            a2 += v * (EM_ACC)wi[2];
            a3 += v * (EM_ACC)wi[3];
        }
    }
    sums[0] = a0;
    sums[1] = a1;
    sums[2] = a2;
    sums[3] = a3;
}
