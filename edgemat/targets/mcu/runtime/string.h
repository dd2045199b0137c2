/* The part of string.h that generated code and compilers call, for machines without a C library. */
#ifndef EDGEMAT_RUNTIME_STRING_H
#define EDGEMAT_RUNTIME_STRING_H

#include <stddef.h>

void* memcpy(void* target, const void* source, size_t count);
void* memmove(void* target, const void* source, size_t count);
void* memset(void* target, int value, size_t count);

#endif /* EDGEMAT_RUNTIME_STRING_H */
