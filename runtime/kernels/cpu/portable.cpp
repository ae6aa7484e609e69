// The kernels in plain C++ for one row of x after the other: the reference that the others are
// compared with.
#include "floats.h"
#include "path.h"
#include "quantize.h"

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace zs {
namespace {

int lowest_bit(uint64_t word) {
#ifdef _MSC_VER
  unsigned long index;
  _BitScanForward64(&index, word);
  return (int)index;
#else
  return __builtin_ctzll(word);
#endif
}

float load(const Weight& w, int64_t i) {
  switch (w.type) {
    case ZS_FLOAT32: return ((const float*)w.values)[i];
    case ZS_FLOAT16: return float16_to_float(((const uint16_t*)w.values)[i]);
    case ZS_BFLOAT16: return bfloat16_to_float(((const uint16_t*)w.values)[i]);
    case ZS_INT8: return (float)((const int8_t*)w.values)[i];
  }
  return 0;
}

bool serves_float(const Weight& w, int64_t, int32_t level) {
  return !(w.type == ZS_INT8 && level == 4);
}

bool serves_int8(const Weight& w, int64_t, int32_t level) {
  return w.type == ZS_INT8 && level == 4;
}

double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.columns * (double)m * (1.3 + 3.9 * w.density);
}

int64_t step(const Weight&, int64_t) { return 1; }

void rows_float(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  for (int64_t n = begin; n < end; n++)
    for (int64_t m = 0; m < c.m; m++) {
      const float* x = c.x + m * w.columns;
      const uint64_t* bits = w.bitmask + n * w.words;
      int64_t i = w.row_offsets[n];
      double sum = 0;
      for (int64_t b = 0; b < w.blocks; b++) {
        double part = 0;
        const int64_t last = std::min(w.words, (b + 1) * w.block_words);
        for (int64_t word = b * w.block_words; word < last; word++)
          for (uint64_t left = bits[word]; left; left &= left - 1)
            part += (double)load(w, i++) * x[word * 64 + lowest_bit(left)];
        sum += w.scales ? part * w.scales[n * w.blocks + b] : part;
      }
      c.y[m * w.rows + n] = (float)sum + (c.bias ? c.bias[n] : 0.0f);
    }
}

// The workspace of the int8 kernel: a RowScale for every row of x, then the rows in 8 bits.
size_t workspace_int8(const Weight& w, int64_t m) {
  return (size_t)m * (sizeof(RowScale) + (size_t)w.columns);
}

int64_t tasks_int8(const Weight&, int64_t m) { return m; }

void prepare_int8(const Call& c, int64_t m) {
  RowScale* scales = (RowScale*)c.workspace;
  uint8_t* q = (uint8_t*)(scales + c.m) + m * c.weight.columns;
  scales[m] = quantize_row(c.x + m * c.weight.columns, c.weight.columns, q);
}

void rows_int8(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  const RowScale* scales = (const RowScale*)c.workspace;
  for (int64_t n = begin; n < end; n++)
    for (int64_t m = 0; m < c.m; m++) {
      const uint8_t* q = (const uint8_t*)(scales + c.m) + m * w.columns;
      const uint64_t* bits = w.bitmask + n * w.words;
      const int8_t* value = (const int8_t*)w.values + w.row_offsets[n];
      double sum = 0;
      for (int64_t b = 0; b < w.blocks; b++) {
        int64_t part = 0;
        const int64_t last = std::min(w.words, (b + 1) * w.block_words);
        for (int64_t word = b * w.block_words; word < last; word++)
          for (uint64_t left = bits[word]; left; left &= left - 1)
            part += (int64_t)*value++ * (q[word * 64 + lowest_bit(left)] - scales[m].zero_point);
        sum += (double)part * w.scales[n * w.blocks + b];
      }
      c.y[m * w.rows + n] = (float)(sum * scales[m].scale) + (c.bias ? c.bias[n] : 0.0f);
    }
}

}  // namespace

// It skips zeros in its loop, but not their meaning: see zs_linear_run.
extern const Path portable_dot = {"portable-dot", kPortable,  0,       true,
                                  serves_float,   cost,       nullptr, nullptr,
                                  nullptr,        nullptr,    step,    rows_float};

extern const Path portable_int8 = {"portable-int8", kPortable,      0,          false,
                                   serves_int8,     cost,           nullptr,    workspace_int8,
                                   tasks_int8,      prepare_int8,   step,       rows_int8};

}  // namespace zs
