/* y[i] = start + step * (thresholds of row c that x[i] reaches), c = i % channels, by binary search; a row
 * holds `count` thresholds in ascending order. EM_X EM_W EM_ACC_BITS EM_Y, EM_STEPS (0: step is 1). May run
 * in place if |X| = |Y|. */
#include "edgemat_variant.h"
#ifndef EM_FUNCTION
#define EM_FUNCTION em_thresholds_s8_s8_s32
#endif
#ifndef EM_STEPS
#define EM_STEPS 0
#endif

void EM_FUNCTION(const em_thresholds_params* p, const EM_X* x, const EM_W* threshold, EM_Y* y);
void EM_FUNCTION(const em_thresholds_params* p, const EM_X* x, const EM_W* threshold, EM_Y* y) {
    const EM_ACC start = (EM_ACC)p->start;
    const EM_ACC step = EM_STEPS ? (EM_ACC)p->step : 1;
    const EM_W* row = threshold;
    int32_t c = 0;
    for (int32_t i = 0; i < p->size; ++i) {
        const EM_ACC v = (EM_ACC)x[i];
        const EM_W* first = row; /* v reaches all thresholds before it, and none from `left` behind it on */
        int32_t left = p->count;
        while (left > 1) {
            const int32_t half = left >> 1;
            first = v >= (EM_ACC)first[half - 1] ? first + half : first;
            left -= half;
        }
        const EM_ACC reached = (EM_ACC)(first - row) + (v >= (EM_ACC)*first ? 1 : 0);
        y[i] = (EM_Y)(start + (EM_STEPS ? step * reached : reached));
        c = c + 1 < p->channels ? c + 1 : 0;
        row = c == 0 ? threshold : row + p->count;
    }
}
#include "edgemat_variant_end.h"
