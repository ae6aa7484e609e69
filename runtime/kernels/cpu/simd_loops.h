// The float loops that AVX2 and NEON share, over a type `S` that holds the instructions.
//
// S lies in an unnamed namespace of the file that includes this, so every function here is compiled
// once for each instruction set and the linker never mixes the copies. S has
//
//   Vector, kLanes                     a register of floats and how many it holds (4 or 8)
//   kTokens                            rows of x that a tile multiplies at once
//   kPanel                             registers that hold one weight's row of x in `skip`
//   zero, set, load, store, add, multiply, fma(a, b, c) = a * b + c
//   load_values(const T*)              kLanes values from memory, as floats
//   expand(values, bits)               the next values where a bit is set, zero elsewhere
//   sum(v), sum4(a, b, c, d, out[4])   over the lanes
//   count(bits), first(bits), prefetch(address)
#pragma once

#include <algorithm>
#include <cstring>

#include "path.h"

namespace zs {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Loads run at most this far ahead of the values in use; further would leave the cache again.
constexpr int64_t kPrefetchBytes = 1024;

template <class S>
struct SimdLoops {
  using Vector = typename S::Vector;
  static constexpr int kLanes = S::kLanes;

  static constexpr int64_t kTileRows = 16, kTileWords = 4, kTileColumns = kTileWords * 64;
  static constexpr int64_t kSkipRows = 32, kSkipWords = 2, kPanelTokens = S::kPanel * kLanes;

  static bool serves(const Weight& w, int64_t, int32_t level) {
    return !(w.type == ZS_INT8 && level == 4);
  }

  // x in the workspace: each row padded with zeros to whole words of the bitmask.
  static size_t padded_bytes(const Weight& w, int64_t m) { return (size_t)(m * w.words) * 256; }

  static int64_t pad_tasks(const Weight&, int64_t m) { return m; }

  static void pad(const Call& c, int64_t token) {
    const int64_t columns = c.weight.columns, padded = c.weight.words * 64;
    if (!padded) return;
    float* to = (float*)c.workspace + token * padded;
    memcpy(to, c.x + token * columns, (size_t)columns * 4);
    std::fill(to + columns, to + padded, 0.0f);
  }

  // The scale of the word of row n; 1 for values that have none.
  static float scale(const Weight& w, int64_t n, int64_t word) {
    return w.scales ? w.scales[n * w.blocks + word / w.block_words] : 1.0f;
  }

  // ---- dot: R rows of W expanded in registers, against M rows of x. ----

  template <class T, int R, int M>
  static void dot_block(const Call& c, int64_t n, int64_t m) {
    const Weight& w = c.weight;
    const int64_t stride = w.words * 64;
    const float* x = (const float*)c.workspace + m * stride;
    const T* value[R];
    const uint64_t* bits[R];
    Vector total[R][M];
    for (int r = 0; r < R; r++) {
      value[r] = (const T*)w.values + w.row_offsets[n + r];
      bits[r] = w.bitmask + (n + r) * w.words;
      for (int t = 0; t < M; t++) total[r][t] = S::zero();
    }
    for (int64_t b = 0; b < w.blocks; b++) {
      Vector part[R][M];
      for (int r = 0; r < R; r++)
        for (int t = 0; t < M; t++) part[r][t] = S::zero();
      const int64_t last = std::min(w.words, (b + 1) * w.block_words);
      for (int64_t word = b * w.block_words; word < last; word++) {
        const float* at = x + word * 64;
        for (int r = 0; r < R; r++) {
          const uint64_t left = bits[r][word];
          S::prefetch((const char*)value[r] + kPrefetchBytes);
          if constexpr (sizeof(T) == 4) S::prefetch((const char*)value[r] + kPrefetchBytes + 64);
          for (int i = 0; i < 64; i += kLanes) {
            const uint32_t lanes = (uint32_t)(left >> i) & ((1u << kLanes) - 1);
            const Vector v = S::expand(S::load_values(value[r]), lanes);
            value[r] += S::count(lanes);
            for (int t = 0; t < M; t++)
              part[r][t] = S::fma(v, S::load(at + t * stride + i), part[r][t]);
          }
        }
      }
      for (int r = 0; r < R; r++) {
        const Vector by = S::set(w.scales ? w.scales[(n + r) * w.blocks + b] : 1.0f);
        for (int t = 0; t < M; t++) total[r][t] = S::fma(part[r][t], by, total[r][t]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < M; t++)
        c.y[(m + t) * w.rows + n + r] = S::sum(total[r][t]) + (c.bias ? c.bias[n + r] : 0.0f);
  }

  template <class T, int M>
  static void dot_tokens(const Call& c, int64_t begin, int64_t end, int64_t m) {
    constexpr int kRows = M <= 2 ? 4 : 2;  // what fits into 16 registers
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows) dot_block<T, kRows, M>(c, n, m);
    for (; n < end; n++) dot_block<T, 1, M>(c, n, m);
  }

  template <class T>
  static void dot_typed(const Call& c, int64_t begin, int64_t end) {
    int64_t m = 0;
    for (; m + 4 <= c.m; m += 4) dot_tokens<T, 4>(c, begin, end, m);
    switch (c.m - m) {
      case 1: return dot_tokens<T, 1>(c, begin, end, m);
      case 2: return dot_tokens<T, 2>(c, begin, end, m);
      case 3: return dot_tokens<T, 3>(c, begin, end, m);
    }
  }

  static int64_t dot_step(const Weight&, int64_t) { return 4; }

  // ---- tile: 16 rows of W by 256 columns decompressed to the first cache, then multiplied. ----

  template <class T>
  static void unpack(const Weight& w, int64_t n, int64_t word, int64_t words, const T*& value,
                     float* to) {
    const uint64_t* bits = w.bitmask + n * w.words + word;
    S::prefetch((const char*)value + kPrefetchBytes);
    for (int64_t i = 0; i < words; i++, to += 64) {
      const Vector by = S::set(scale(w, n, word + i));
      for (int j = 0; j < 64; j += kLanes) {
        const uint32_t lanes = (uint32_t)(bits[i] >> j) & ((1u << kLanes) - 1);
        Vector v = S::expand(S::load_values(value), lanes);
        if constexpr (sizeof(T) == 1) v = S::multiply(v, by);
        S::store(to + j, v);
        value += S::count(lanes);
      }
    }
  }

  // out[t][r] = tile[r] . x[t], 4 rows of the tile and M rows of x.
  template <int M>
  static void multiply_tile(const float* tile, const float* x, int64_t stride, int64_t columns,
                            float (*out)[4]) {
    Vector part[M][4];
    for (int t = 0; t < M; t++)
      for (int r = 0; r < 4; r++) part[t][r] = S::zero();
    for (int64_t k = 0; k < columns; k += kLanes) {
      Vector at[M];
      for (int t = 0; t < M; t++) at[t] = S::load(x + t * stride + k);
      for (int r = 0; r < 4; r++) {
        const Vector v = S::load(tile + r * kTileColumns + k);
        for (int t = 0; t < M; t++) part[t][r] = S::fma(v, at[t], part[t][r]);
      }
    }
    for (int t = 0; t < M; t++) S::sum4(part[t][0], part[t][1], part[t][2], part[t][3], out[t]);
  }

  // Adds M rows of x times one tile to y; `first` begins with the bias instead.
  template <int M>
  static void tile_tokens(const Call& c, const float* tile, int64_t n, int64_t count, int64_t word,
                          int64_t words, int64_t m) {
    const Weight& w = c.weight;
    const int64_t stride = w.words * 64;
    const float* x = (const float*)c.workspace + m * stride + word * 64;
    for (int64_t r = 0; r < count; r += 4) {
      float out[M][4];
      multiply_tile<M>(tile + r * kTileColumns, x, stride, words * 64, out);
      const int64_t rows = std::min<int64_t>(4, count - r);
      for (int t = 0; t < M; t++) {
        float* y = c.y + (m + t) * w.rows + n + r;
        for (int64_t i = 0; i < rows; i++) {
          const float before = word ? y[i] : c.bias ? c.bias[n + r + i] : 0.0f;
          y[i] = before + out[t][i];
        }
      }
    }
  }

  template <class T>
  static void tile_typed(const Call& c, int64_t begin, int64_t end) {
    const Weight& w = c.weight;
    alignas(64) float tile[kTileRows * kTileColumns];
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int64_t count = std::min(kTileRows, end - n);
      // A last group of fewer than 4 rows is multiplied as 4.
      std::fill(tile + count * kTileColumns, tile + kTileRows * kTileColumns, 0.0f);
      const T* value[kTileRows] = {};
      for (int64_t r = 0; r < count; r++) value[r] = (const T*)w.values + w.row_offsets[n + r];
      for (int64_t word = 0; word < w.words; word += kTileWords) {
        const int64_t words = std::min(kTileWords, w.words - word);
        for (int64_t r = 0; r < count; r++)
          unpack(w, n + r, word, words, value[r], tile + r * kTileColumns);
        constexpr int M = S::kTokens;
        int64_t m = 0;
        for (; m + M <= c.m; m += M) tile_tokens<M>(c, tile, n, count, word, words, m);
        for (; m < c.m; m++) tile_tokens<1>(c, tile, n, count, word, words, m);
      }
    }
    if (!w.words) fill_bias(c, begin, end);
  }

  static int64_t tile_step(const Weight&, int64_t) { return kTileRows; }

  // What a weight without columns answers.
  static void fill_bias(const Call& c, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < c.m; m++)
      for (int64_t n = begin; n < end; n++) c.y[m * c.weight.rows + n] = c.bias ? c.bias[n] : 0.0f;
  }

  // ---- skip: lanes over rows of x, one step for each kept weight. ----

  // x in panels of kPanelTokens rows, column after column; missing rows are zeros.
  static size_t panel_bytes(const Weight& w, int64_t m) {
    return (size_t)((m + kPanelTokens - 1) / kPanelTokens * kPanelTokens * w.words) * 256;
  }

  static int64_t panel_tasks(const Weight& w, int64_t m) {
    return (m + kPanelTokens - 1) / kPanelTokens * w.words;
  }

  static void panel(const Call& c, int64_t task) {
    const Weight& w = c.weight;
    const int64_t first = task / w.words * kPanelTokens, k = task % w.words * 64;
    const int64_t tokens = std::min(kPanelTokens, c.m - first);
    const int64_t columns = std::min<int64_t>(64, w.columns - k);
    float* to = (float*)c.workspace + task * 64 * kPanelTokens;
    std::fill(to, to + 64 * kPanelTokens, 0.0f);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < columns; i++)
        to[i * kPanelTokens + t] = c.x[(first + t) * w.columns + k + i];
  }

  // `count` values as floats with their scale; writes up to kLanes - 1 more.
  template <class T>
  static void widen(const T* value, int count, float by, float* to) {
    const Vector scales = S::set(by);
    for (int i = 0; i < count; i += kLanes) {
      Vector v = S::load_values(value + i);
      if constexpr (sizeof(T) == 1) v = S::multiply(v, scales);
      S::store(to + i, v);
    }
  }

  // sum[token] += weights of one row in `words` words of the bitmask times the panel.
  template <class T>
  static void skip_row(const Weight& w, int64_t n, int64_t word, int64_t words, const T*& value,
                       const float* x, float* sum) {
    Vector part[S::kPanel];
    for (int v = 0; v < S::kPanel; v++) part[v] = S::load(sum + v * kLanes);
    const uint64_t* bits = w.bitmask + n * w.words + word;
    alignas(32) float wide[64 + kLanes];
    for (int64_t i = 0; i < words; i++, x += 64 * kPanelTokens) {
      const float* next = wide;
      const int count = S::count(bits[i]);
      if constexpr (sizeof(T) == 4)
        next = value;
      else
        widen(value, count, scale(w, n, word + i), wide);
      value += count;
      for (uint64_t left = bits[i]; left; left &= left - 1) {
        const float* at = x + S::first(left) * kPanelTokens;
        const Vector weight = S::set(*next++);
        for (int v = 0; v < S::kPanel; v++)
          part[v] = S::fma(weight, S::load(at + v * kLanes), part[v]);
      }
    }
    for (int v = 0; v < S::kPanel; v++) S::store(sum + v * kLanes, part[v]);
  }

  template <class T>
  static void skip_typed(const Call& c, int64_t begin, int64_t end) {
    const Weight& w = c.weight;
    alignas(64) float sum[kSkipRows * kPanelTokens];
    for (int64_t n = begin; n < end; n += kSkipRows) {
      const int64_t rows = std::min(kSkipRows, end - n);
      for (int64_t m = 0; m < c.m; m += kPanelTokens) {
        const T* value[kSkipRows];
        for (int64_t r = 0; r < rows; r++) value[r] = (const T*)w.values + w.row_offsets[n + r];
        std::fill(sum, sum + rows * kPanelTokens, 0.0f);
        // Two words at a time keep their part of the panel in the first cache for all the rows.
        const float* x = (const float*)c.workspace + m * w.words * 64;
        for (int64_t word = 0; word < w.words; word += kSkipWords) {
          const int64_t words = std::min(kSkipWords, w.words - word);
          for (int64_t r = 0; r < rows; r++)
            skip_row(w, n + r, word, words, value[r], x + word * 64 * kPanelTokens,
                     sum + r * kPanelTokens);
        }
        const int64_t tokens = std::min(kPanelTokens, c.m - m);
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t r = 0; r < rows; r++)
            c.y[(m + t) * w.rows + n + r] =
                sum[r * kPanelTokens + t] + (c.bias ? c.bias[n + r] : 0.0f);
      }
    }
  }

  static int64_t skip_step(const Weight&, int64_t) { return kSkipRows; }

  // ---- The kernels of all types. ----

  static void dot_rows(const Call& c, int64_t begin, int64_t end) {
    switch (c.weight.type) {
      case ZS_FLOAT32: return dot_typed<float>(c, begin, end);
      case ZS_FLOAT16: return dot_typed<Float16>(c, begin, end);
      case ZS_BFLOAT16: return dot_typed<BFloat16>(c, begin, end);
      case ZS_INT8: return dot_typed<int8_t>(c, begin, end);
    }
  }

  static void tile_rows(const Call& c, int64_t begin, int64_t end) {
    switch (c.weight.type) {
      case ZS_FLOAT32: return tile_typed<float>(c, begin, end);
      case ZS_FLOAT16: return tile_typed<Float16>(c, begin, end);
      case ZS_BFLOAT16: return tile_typed<BFloat16>(c, begin, end);
      case ZS_INT8: return tile_typed<int8_t>(c, begin, end);
    }
  }

  static void skip_rows(const Call& c, int64_t begin, int64_t end) {
    switch (c.weight.type) {
      case ZS_FLOAT32: return skip_typed<float>(c, begin, end);
      case ZS_FLOAT16: return skip_typed<Float16>(c, begin, end);
      case ZS_BFLOAT16: return skip_typed<BFloat16>(c, begin, end);
      case ZS_INT8: return skip_typed<int8_t>(c, begin, end);
    }
  }
};

}  // namespace zs
