/* The part of a window that lies inside the map, along one axis. */
#ifndef EDGEMAT_WINDOW_H
#define EDGEMAT_WINDOW_H

#include "edgemat_kernels.h"

typedef struct em_span {
    int32_t begin, end; /* taps begin .. end-1 lie inside; begin >= end: none does, and both are 0 */
    int32_t first;      /* input position of tap `begin` (0 where there is none) */
} em_span;

EM_INLINE em_span em_taps(int32_t start, int32_t dilation, int32_t kernel, int32_t size) {
    em_span span = {0, 0, 0};
    const int32_t begin = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const int32_t first = start + begin * dilation;
    if (begin >= kernel || first >= size) {
        return span;
    }
    const int32_t inside = (size - 1 - first) / dilation + 1;
    span.begin = begin;
    span.end = inside < kernel - begin ? begin + inside : kernel;
    span.first = first;
    return span;
}

#endif /* EDGEMAT_WINDOW_H */
