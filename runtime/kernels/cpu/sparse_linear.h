/* The C interface of zeroskip's CPU kernels: y = x W^T + b with a bitmask-compressed W.

   W[n, k] is kept where bit k % 64 of word k / 64 of row n is set; the kept values of a row lie one
   after the other, row after row, and `ZS_PADDING` readable elements follow the last one:

     bitmask      uint64 [rows, ceil(columns / 64)], bits beyond `columns` clear
     row_offsets  int64  [rows + 1], the first value of each row; row_offsets[0] = 0
     values       float32, float16, bfloat16 or int8 [row_offsets[rows] + ZS_PADDING]
     scales       float32 [rows, blocks], int8 only: W = value * scale of its row and block

   2:4 weights are this same format. Nothing is copied: the arrays are used where they are, so that
   they can be a mapped file. A `zs_linear` never changes after it was made: any number of threads
   may run it at once. There is no global state. */
#ifndef ZEROSKIP_SPARSE_LINEAR_H
#define ZEROSKIP_SPARSE_LINEAR_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ZS_EXPORT __declspec(dllexport)
#else
#define ZS_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { ZS_ABI_VERSION = 1, ZS_PADDING = 64, ZS_MESSAGE_SIZE = 256 };

typedef enum { ZS_FLOAT32 = 0, ZS_FLOAT16 = 1, ZS_BFLOAT16 = 2, ZS_INT8 = 3 } zs_value_type;

/* Where a weight lies; counts are the sizes of the arrays, in elements, and are checked. */
typedef struct zs_weight {
  int64_t rows;    /* out_features */
  int64_t columns; /* in_features */
  const uint64_t* bitmask;
  int64_t bitmask_count;
  const int64_t* row_offsets;
  int64_t row_offsets_count;
  const void* values;
  int64_t values_count;
  const float* scales; /* null unless int8 */
  int64_t scales_count;
  int64_t block_size; /* columns that share a scale, a multiple of 64; 0: the whole row */
  int32_t value_type; /* zs_value_type */
} zs_weight;

/* How a weight is to be run. Zero means: choose. */
typedef struct zs_options {
  /* 0: on the arrays as they are (memory-mapped weights stay shared).
     1: repacked once for many tokens, at the price of that memory. */
  int32_t layout;
  /* As in MatMulNBits: 4 rounds each row of x to 8 bits (int8 values only); 0 leaves x in float32. */
  int32_t accuracy_level;
  /* Use no instruction set beyond this: "portable", "avx2", "avx512", "amx", "neon"; null: any. */
  const char* instruction_set;
  /* Use this kernel for every call, by name, or fail; null: the fastest. For tests and tuning. */
  const char* kernel;
} zs_options;

typedef struct zs_linear zs_linear;

/* Runs task(argument, i) for every i below count, in any order and on any threads, then returns. */
typedef void (*zs_parallel_for)(void* context, void (*task)(void* argument, size_t index),
                                size_t count, void* argument);

ZS_EXPORT int32_t zs_abi_version(void);

/* The instruction sets that this CPU and this build have, best first, separated by spaces. */
ZS_EXPORT const char* zs_instruction_sets(void);

/* The kernels of this build that this CPU can run, one for each index from 0 on; null: no more. */
ZS_EXPORT const char* zs_kernel_name(int32_t index);

/* Checks a weight and makes it ready. The arrays must outlive the result.
   Returns 0, or 1 with a sentence in message (at least ZS_MESSAGE_SIZE bytes). */
ZS_EXPORT int32_t zs_linear_create(const zs_weight* weight, const zs_options* options,
                                   zs_linear** linear, char* message);
ZS_EXPORT void zs_linear_destroy(zs_linear* linear);

/* The memory that a linear holds besides the arrays, in bytes. */
ZS_EXPORT size_t zs_linear_bytes(const zs_linear* linear);

/* The kernel that serves m rows of x, such as "avx512-dot"; null: none can. */
ZS_EXPORT const char* zs_linear_kernel(const zs_linear* linear, int64_t m);

/* The scratch memory that a run with m rows of x needs, in bytes. */
ZS_EXPORT size_t zs_linear_workspace(const zs_linear* linear, int64_t m);

/* y[m, rows] = x[m, columns] W^T + bias[rows] (bias may be null), all float32.

   workspace: zs_linear_workspace(linear, m) bytes, aligned to 64, or null: allocated.
   run: null runs everything on the calling thread.
   Returns 0, or 1 when memory is exhausted or the kernel asked for by name does not take m rows. */
ZS_EXPORT int32_t zs_linear_run(const zs_linear* linear, const float* x, int64_t m, float* y,
                                const float* bias, void* workspace, zs_parallel_for run,
                                void* context);

/* Threads for callers that have no pool of their own; `zs_pool_run` is a zs_parallel_for. */
typedef struct zs_pool zs_pool;
ZS_EXPORT zs_pool* zs_pool_create(int32_t threads);
ZS_EXPORT void zs_pool_destroy(zs_pool* pool);
ZS_EXPORT void zs_pool_run(void* pool, void (*task)(void* argument, size_t index), size_t count,
                           void* argument);

#ifdef __cplusplus
}
#endif
#endif
