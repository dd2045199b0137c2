/* edgemat kernels: element types, status codes and parameter structures.
 *
 * Every kernel file is a template over element types: define the EM_* macros that its first comment lists and
 * include it, once per variant. Compiled alone, a file gives one default variant.
 *
 * Tensors hold one sample, channels last. Codes of at most 8 bits are stored in int8_t / uint8_t, of at most
 * 16 in int16_t / uint16_t, of at most 32 in int32_t, else int64_t.
 *
 * Accumulators are EM_ACC, int32_t or int64_t. The caller has proven that no partial sum, taken in any order,
 * leaves EM_ACC; the kernels do not check it.
 */
#ifndef EDGEMAT_KERNELS_H
#define EDGEMAT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define EM_INLINE static inline __attribute__((always_inline))
#define EM_NOINLINE __attribute__((noinline))
#define EM_MAYBE_UNUSED __attribute__((unused))
#else
#define EM_INLINE static inline
#define EM_NOINLINE
#define EM_MAYBE_UNUSED
#endif

/* Negative right shifts must be arithmetic (true of every compiler edgemat knows). */
typedef char em_require_arithmetic_shift[((-3) >> 1) == -2 ? 1 : -1];

typedef enum em_status {
    EM_OK = 0,
    EM_ERROR_NULL = 1,  /* a pointer argument is NULL */
    EM_ERROR_ARENA = 2, /* the arena is too small or not aligned to 8 bytes */
    EM_ERROR_NAN = 3,   /* a float input is NaN */
    EM_ERROR_RANGE = 4, /* an infinite float input under WRAP, or an index that is no row of its table */
    EM_ERROR_STATE = 5  /* run before init */
} em_status;

/* Requantisation of an exact accumulator: shift right by shift[channel] (left where negative), round,
 * overflow. Modes and code range are compile-time constants of the kernel variant (edgemat_variant.h). */
typedef struct em_epilogue {
    const int8_t* shift; /* one entry, or one per channel when the variant has EM_PER_CHANNEL */
    int32_t channels; /* entries of shift or width; element i of a result belongs to channel i % channels */
    const uint8_t* width; /* bits of each channel's code (0: always 0) when the variant has EM_WIDTHS */
} em_epilogue;

typedef struct em_requantize_params {
    int32_t size;
} em_requantize_params;

/* weight: rows interleaved in blocks of four output features (linear.c). */
typedef struct em_linear_params {
    int32_t rows, in_features, out_features, has_bias;
} em_linear_params;

/* 1-D convolutions have in_h = kernel_h = 1. pad_bottom and pad_right are implied by out_h and out_w. */
typedef struct em_conv_params {
    int32_t in_h, in_w, in_c, out_h, out_w, out_c;
    int32_t kernel_h, kernel_w, stride_h, stride_w;
    int32_t pad_top, pad_left, dilation_h, dilation_w;
    int32_t groups, has_bias;
} em_conv_params;

typedef struct em_affine_params {
    int32_t size, channels;
} em_affine_params;

typedef struct em_relu_params {
    int32_t size;
} em_relu_params;

typedef struct em_clip_params {
    int64_t low, high;
    int32_t size, align;
} em_clip_params;

/* Element (i0,i1,i2,i3) of the result joins x0[sum i*stride0] and x1[sum i*stride1]; broadcast = 0: plain
 * loop. */
typedef struct em_binary_params {
    int32_t size, align0, align1, broadcast;
    int32_t dims[4], stride0[4], stride1[4];
} em_binary_params;

typedef struct em_pool_params {
    int32_t in_h, in_w, in_c, out_h, out_w;
    int32_t kernel_h, kernel_w, stride_h, stride_w;
    int32_t pad_top, pad_left, pad_bottom, pad_right;
    int32_t dilation_h, dilation_w, count_include_pad;
} em_pool_params;

typedef struct em_concat_params {
    int32_t outer, inner; /* inner: elements of this input per outer step */
    int32_t row, offset;  /* elements of the result per outer step, and where this input begins in them */
} em_concat_params;

/* y[i0,i1,i2,i3] = x[offset + sum i*stride] */
typedef struct em_strided_params {
    int32_t dims[4], stride[4], offset;
} em_strided_params;

typedef struct em_pad_params {
    int64_t value;
    int32_t in_dims[4], before[4], after[4];
} em_pad_params;

typedef struct em_arg_max_params {
    int32_t outer, axis_size, inner, last;
} em_arg_max_params;

typedef struct em_table_params {
    int32_t size, x_min;
} em_table_params;

typedef struct em_thresholds_params {
    int64_t start, step;
    int32_t size, channels, count; /* channels: rows of thresholds, 1 for one of all channels */
} em_thresholds_params;

typedef struct em_embedding_params {
    int32_t rows, depth;
} em_embedding_params;

typedef struct em_prelu_params {
    int32_t size, channels, align;
} em_prelu_params;

typedef struct em_upsample_params {
    int32_t in_h, in_w, in_c, scale_h, scale_w;
} em_upsample_params;

typedef struct em_softmax_params {
    int32_t outer, axis_size, inner, shift;
} em_softmax_params;

typedef struct em_norm_params {
    int64_t total_offset; /* what eps adds to the total of a row */
    int32_t norm_min, norm_max, root;
    int32_t rows, features, norm_shift, has_gain, has_bias;
} em_norm_params;

typedef struct em_token_exponent_params {
    int32_t rows, features, width;
} em_token_exponent_params;

typedef struct em_rows_params {
    int32_t rows, features;
} em_rows_params;

typedef struct em_matmul_params {
    int32_t batch, m, k, n;
} em_matmul_params;

#endif /* EDGEMAT_KERNELS_H */
