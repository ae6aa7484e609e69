// What a kernel is to the rest of the library: a Path, one constant of function pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "sparse_linear.h"

namespace zs {

// A checked weight. `density` is the share of kept weights, between 0 and 1; `even` says that 8 of
// every 16 columns are kept throughout, as in 2:4 and 4:8 weights of whole words, and `even_eights`
// that 4 of every 8 are.
struct Weight {
  int64_t rows, columns, words;  // words: uint64 of bitmask in a row
  const uint64_t* bitmask;
  const int64_t* row_offsets;
  const void* values;
  const float* scales;  // int8: [rows, blocks]
  int64_t block_words;  // words of bitmask that share a scale; `words` when a row has one scale
  int64_t blocks;       // scales in a row
  zs_value_type type;
  double density;
  bool even, even_eights;
};

inline size_t value_bytes(zs_value_type type) {
  return type == ZS_FLOAT32 ? 4 : type == ZS_INT8 ? 1 : 2;
}

// Another form of a weight, made once by `Path::make_form`.
struct Form {
  virtual ~Form() = default;
  virtual size_t bytes() const = 0;
};

// One product y = x W^T + bias. `workspace` is aligned to 64 and shared by all tasks.
struct Call {
  const Weight& weight;
  const Form* form;
  const float* x;
  int64_t m;
  float* y;
  const float* bias;  // may be null
  char* workspace;
};

// Bits of Path::needs: what the CPU must have.
enum Feature : uint32_t {
  kPortable = 0,
  kAvx2 = 1u << 0,        // AVX2, FMA, F16C, BMI2, POPCNT
  kAvx512 = 1u << 1,      // F, BW, DQ, VL, VBMI2, and all of kAvx2
  kAvx512Vnni = 1u << 2,  // kAvx512 and VNNI
  kAvx512Bf16 = 1u << 3,
  kAvx512Fp16 = 1u << 4,
  kAmx = 1u << 5,  // AMX-TILE, AMX-INT8, AMX-BF16, allowed by the system, and kAvx512Vnni
  kNeon = 1u << 6,
  kNeonDot = 1u << 7,
};

// A kernel for one instruction set and one regime.
//
// A run is `prepare(call, i)` for every i < prepare_tasks(weight, m), which usually lays x out in
// the workspace, then `rows(call, begin, end)` over disjoint ranges of rows of W whose bounds are
// multiples of row_step (but for the last). Tasks keep at most 96 KiB on their stack.
struct Path {
  const char* name;  // "<instruction set>-<regime>"
  uint32_t needs;    // all of these Features

  // 0: runs on the stored arrays (a small form is allowed); 1: wants layout = throughput.
  int32_t layout;

  // Whether zeros of W are skipped, so that 0 * NaN is 0: rows of x that are not finite are then
  // computed again by a path that does not skip.
  bool skips_zeros;

  // Whether this path can compute m rows of x. `accuracy_level` is 0 or 4.
  bool (*serves)(const Weight& weight, int64_t m, int32_t accuracy_level);

  // Estimated time of one call in CPU cycles on one thread; the cheapest path that serves is taken.
  double (*cost)(const Weight& weight, int64_t m);

  // All below but `rows` and `row_step` may be null: no form, no workspace, nothing to prepare.
  std::unique_ptr<Form> (*make_form)(const Weight& weight);
  size_t (*workspace)(const Weight& weight, int64_t m);
  int64_t (*prepare_tasks)(const Weight& weight, int64_t m);
  void (*prepare)(const Call& call, int64_t task);
  int64_t (*row_step)(const Weight& weight, int64_t m);
  void (*rows)(const Call& call, int64_t begin, int64_t end);

  // Whether all of x is finite, where `prepare` finds that out on its way; null: x is looked at.
  bool (*finite)(const Call& call) = nullptr;
};

// The features of this CPU (cpu.cpp).
uint32_t cpu_features();

// The features that remain when nothing beyond an instruction set is allowed; ~0u: unknown name.
uint32_t features_up_to(const char* instruction_set);

// Every path of this build (paths.cpp).
struct PathList {
  const Path* const* begin;
  const Path* const* end;
};
PathList all_paths();

}  // namespace zs
