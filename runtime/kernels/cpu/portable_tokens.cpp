// Several rows of x at once in plain C++: the innermost loops run over tokens, so that compilers
// make vector code of them for any CPU.
#include <algorithm>
#include <limits>

#include "floats.h"
#include "path.h"
#include "quantize.h"
#include "simd_loops.h"

namespace zs {
namespace {

constexpr int64_t kMostTokens = 64;    // of a block
constexpr int64_t kRows = 16;          // of W that pass over one part of x
constexpr int64_t kPartFloats = 8192;  // of x: what stays in the first-level cache
constexpr int64_t kMostWords = 8;      // of a row of W that are decoded at once
constexpr int64_t kTransposed = 64;    // columns of x that are transposed at once

// x in the workspace: first a factor for each token, by which its outputs are multiplied, then
// blocks of [columns, tokens]. Tokens are padded with zeros to whole groups.
struct Blocks {
  int64_t count, tokens, group;
};

Blocks token_blocks(int64_t m) {
  const int64_t count = (m + kMostTokens - 1) / kMostTokens;
  const int64_t tokens = (m + count - 1) / count;
  const int64_t group = tokens <= 8 ? 4 : 16;
  return {count, (tokens + group - 1) / group * group, group};
}

size_t workspace(const Weight& w, int64_t m) {
  const Blocks blocks = token_blocks(m);
  return (size_t)(blocks.count * blocks.tokens * (1 + w.columns)) * sizeof(float);
}

float* block_at(const Call& c, const Blocks& blocks, int64_t block) {
  return (float*)c.workspace + blocks.tokens * (blocks.count + block * c.weight.columns);
}

int64_t prepare_tasks(const Weight&, int64_t m) { return token_blocks(m).count; }

// Transposes one block of x; `convert(row, value)` gives what a number of a row becomes.
template <class Convert>
void arrange(const Call& c, int64_t block, const Convert& convert) {
  const Blocks blocks = token_blocks(c.m);
  const int64_t columns = c.weight.columns, first = block * blocks.tokens;
  const int64_t tokens = std::max<int64_t>(0, std::min(blocks.tokens, c.m - first));
  float* to = block_at(c, blocks, block);
  for (int64_t begin = 0; begin < columns; begin += kTransposed) {
    const int64_t end = std::min(columns, begin + kTransposed);
    for (int64_t t = 0; t < blocks.tokens; t++) {
      const float* x = c.x + (first + t) * columns;
      for (int64_t k = begin; k < end; k++)
        to[k * blocks.tokens + t] = t < tokens ? convert(t, x[k]) : 0.0f;
    }
  }
}

void prepare_float(const Call& c, int64_t block) {
  const Blocks blocks = token_blocks(c.m);
  float* factors = (float*)c.workspace + block * blocks.tokens;
  std::fill(factors, factors + blocks.tokens, 1.0f);
  arrange(c, block, [](int64_t, float value) { return value; });
}

// Whole numbers between -255 and 255 in floats; a row that is not finite becomes zeros times NaN.
void prepare_int8(const Call& c, int64_t block) {
  const Blocks blocks = token_blocks(c.m);
  const int64_t columns = c.weight.columns, first = block * blocks.tokens;
  RowScale rows[kMostTokens];
  for (int64_t t = 0; t < blocks.tokens; t++) {
    rows[t] = first + t < c.m ? row_scale(c.x + (first + t) * columns, columns) : RowScale{0, 0};
    ((float*)c.workspace)[first + t] = rows[t].scale;
  }
  arrange(c, block, [&](int64_t t, float value) {
    if (std::isnan(rows[t].scale)) return 0.0f;
    return (float)((int32_t)quantize(value, rows[t]) - rows[t].zero_point);
  });
}

// For each byte of a bitmask: how many bits are set, and where.
struct ByteTable {
  uint16_t columns[256][8];
  uint8_t count[256];
};

constexpr ByteTable make_table() {
  ByteTable table = {};
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0; bit < 8; bit++)
      if (byte >> bit & 1) table.columns[byte][table.count[byte]++] = (uint16_t)bit;
  return table;
}

constexpr ByteTable kBytes = make_table();

float to_float(float value) { return value; }
float to_float(int8_t value) { return value; }
float to_float(Float16 value) { return float16_to_float(value.bits); }
float to_float(BFloat16 value) { return bfloat16_to_float(value.bits); }

// Kept weights of a part of a row, and the column of each within the part. A byte of the bitmask
// writes 8 columns, whatever it keeps.
struct Kept {
  int64_t count;
  float values[kMostWords * 64 + 4];
  uint16_t columns[kMostWords * 64 + 8];
};

template <class T>
void decode(const Weight& w, int64_t n, int64_t word, int64_t words, const T*& value, Kept& kept) {
  const uint64_t* bits = w.bitmask + n * w.words + word;
  int64_t count = 0;
  for (int64_t i = 0; i < words; i++) {
    const int64_t before = count;
    uint64_t left = bits[i];
    for (int64_t column = i * 64; left; column += 8, left >>= 8) {
      const uint16_t* from = kBytes.columns[left & 255];
      uint16_t* to = kept.columns + count;
      for (int j = 0; j < 8; j++) to[j] = (uint16_t)(from[j] + column);
      count += kBytes.count[left & 255];
    }
    for (int64_t j = before; j < count; j++) kept.values[j] = to_float(*value++);
  }
  // Zeros up to a multiple of 4.
  for (; count % 4; count++) kept.columns[count] = 0, kept.values[count] = 0;
  kept.count = count;
}

// sum[t] += the kept weights times their columns of x, 4 of them at a time: a sum is loaded and
// stored once for the four.
template <int group>
void add(const Kept& kept, const float* x, int64_t tokens, float* __restrict sum) {
  for (int64_t i = 0; i < kept.count; i += 4) {
    const float* value = kept.values + i;
    const float a = value[0], b = value[1], c = value[2], d = value[3];
    const float* __restrict xa = x + kept.columns[i] * tokens;
    const float* __restrict xb = x + kept.columns[i + 1] * tokens;
    const float* __restrict xc = x + kept.columns[i + 2] * tokens;
    const float* __restrict xd = x + kept.columns[i + 3] * tokens;
    for (int64_t t = 0; t < tokens; t += group)
      for (int64_t j = t; j < t + group; j++)
        sum[j] += (a * xa[j] + b * xb[j]) + (c * xc[j] + d * xd[j]);
  }
}

// total += the part of row n that begins at a word of the bitmask and lies within one block of
// scales. Its sum is exact for whole numbers: 512 x 255 x 128 is less than 2^24.
template <class T>
void add_part(const Call& c, const Blocks& blocks, const float* x, int64_t n, int64_t word,
              int64_t words, const T*& value, double* total) {
  const Weight& w = c.weight;
  Kept kept;
  decode(w, n, word, words, value, kept);
  alignas(64) float sum[kMostTokens] = {};
  if (blocks.group == 16)
    add<16>(kept, x, blocks.tokens, sum);
  else
    add<4>(kept, x, blocks.tokens, sum);
  const double scale = w.scales ? w.scales[n * w.blocks + word / w.block_words] : 1.0f;
  for (int64_t t = 0; t < blocks.tokens; t++) total[t] += sum[t] * scale;
}

template <class T>
void rows_of_type(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  const Blocks blocks = token_blocks(c.m);
  const int64_t tokens = blocks.tokens;
  const int64_t most = std::min(kMostWords, std::max<int64_t>(1, kPartFloats / (tokens * 64)));
  const float* factors = (const float*)c.workspace;
  alignas(64) double total[kRows * kMostTokens];
  for (int64_t n = begin; n < end; n += kRows) {
    const int64_t rows = std::min(kRows, end - n);
    for (int64_t block = 0; block < blocks.count; block++) {
      const T* value[kRows];
      for (int64_t r = 0; r < rows; r++) value[r] = (const T*)w.values + w.row_offsets[n + r];
      std::fill(total, total + rows * tokens, 0.0);
      int64_t word = 0;
      while (word < w.words) {
        const int64_t left = w.block_words - word % w.block_words;  // of a block of scales
        const int64_t words = std::min({most, left, w.words - word});
        const float* x = block_at(c, blocks, block) + word * 64 * tokens;
        for (int64_t r = 0; r < rows; r++)
          add_part(c, blocks, x, n + r, word, words, value[r], total + r * tokens);
        word += words;
      }
      const int64_t first = block * tokens, used = std::min(tokens, c.m - first);
      for (int64_t t = 0; t < used; t++)
        for (int64_t r = 0; r < rows; r++)
          c.y[(first + t) * w.rows + n + r] =
              (float)(total[r * tokens + t] * factors[first + t]) + (c.bias ? c.bias[n + r] : 0.0f);
    }
  }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  switch (c.weight.type) {
    case ZS_FLOAT32: return rows_of_type<float>(c, begin, end);
    case ZS_FLOAT16: return rows_of_type<Float16>(c, begin, end);
    case ZS_BFLOAT16: return rows_of_type<BFloat16>(c, begin, end);
    case ZS_INT8: return rows_of_type<int8_t>(c, begin, end);
  }
}

int64_t row_step(const Weight&, int64_t) { return kRows; }

bool serves_float(const Weight& w, int64_t, int32_t level) {
  return !(w.type == ZS_INT8 && level == 4);
}

bool serves_int8(const Weight& w, int64_t, int32_t level) {
  return w.type == ZS_INT8 && level == 4;
}

// Cycles, from 512 x 1024 weights beside the AVX2 kernels and their costs, in code for SSE2.
double cost(const Weight& w, int64_t m) {
  const Blocks blocks = token_blocks(m);
  const double decoding = (double)blocks.count * (1.2 + 3.0 * w.density);
  const double products = (double)(blocks.count * blocks.tokens) * (0.06 + 0.29 * w.density);
  return (double)w.rows * (double)w.columns * (decoding + products);
}

}  // namespace

// Zeros of W are skipped; at accuracy_level 4 a row of x that is not finite has a factor of NaN.
extern const Path portable_tokens = {
    "portable-tokens", kPortable, 0,         true,          serves_float, cost,
    nullptr,           workspace, prepare_tasks, prepare_float, row_step, rows};

extern const Path portable_int8_tokens = {
    "portable-int8-tokens", kPortable, 0,         false,        serves_int8, cost,
    nullptr,                workspace, prepare_tasks, prepare_int8, row_step, rows};

}  // namespace zs
