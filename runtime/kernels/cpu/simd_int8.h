// The loop of the AVX2 and NEON kernels for 8-bit activations, over a type `S` with
//
//   Element                  what a weight and an activation are widened to: int16 or int8
//   Sum                      a register of int32
//   kTokens                  rows of x that are multiplied at once
//   kFixedOffset             what is subtracted from q; -1: the zero point of its row
//   zero, load(from), accumulate(sum, w, x), kStep    sum += w . x over kStep elements
//   sum4(a, b, c, d, out[4])
//   unpack(value, bits, to)  64 weights of which those with a bit are the next values; returns
//                            where the values go on
//
// As in simd_loops.h, S lies in an unnamed namespace.
#pragma once

#include <algorithm>

#include "path.h"
#include "quantize.h"

namespace zs {

template <class S>
struct SimdInt8 {
  using Element = typename S::Element;
  using Sum = typename S::Sum;

  // 16 rows of W by 512 columns, multiplied 4 rows at a time: what is read of x serves them all.
  // 16 KiB at most, and 512 * 255 * 128 is far from 2^31.
  static constexpr int64_t kRows = 16, kWords = 8, kColumns = kWords * 64;

  static bool serves(const Weight& w, int64_t, int32_t level) {
    return w.type == ZS_INT8 && level == 4;
  }

  // The workspace: the rows of x, padded to whole words of the bitmask, then a RowScale for each.
  static size_t x_bytes(const Weight& w, int64_t m) {
    return (size_t)(m * w.words) * 64 * sizeof(Element);
  }
  static size_t workspace(const Weight& w, int64_t m) {
    return x_bytes(w, m) + (size_t)m * sizeof(RowScale);
  }
  static int64_t prepare_tasks(const Weight&, int64_t m) { return m; }

  static void prepare(const Call& c, int64_t token) {
    const Weight& w = c.weight;
    const float* x = c.x + token * w.columns;
    Element* to = (Element*)c.workspace + token * w.words * 64;
    RowScale& row = ((RowScale*)(c.workspace + x_bytes(w, c.m)))[token];
    row = S::range(x, w.columns);
    const int32_t offset = S::kFixedOffset < 0 ? row.zero_point : S::kFixedOffset;
    if (std::isnan(row.scale))
      std::fill(to, to + w.columns, (Element)0);
    else
      S::quantize_row(x, w.columns, row, offset, to);
    std::fill(to + w.columns, to + w.words * 64, (Element)0);
  }

  // out[t][r] = W[r] . x[t] in whole numbers.
  template <int M>
  static void multiply(const Element* tile, const Element* x, int64_t stride, int64_t columns,
                       int32_t (*out)[4]) {
    Sum part[M][4];
    for (int t = 0; t < M; t++)
      for (int r = 0; r < 4; r++) part[t][r] = S::zero();
    for (int64_t k = 0; k < columns; k += S::kStep) {
      decltype(S::load(x)) at[M];
      for (int t = 0; t < M; t++) at[t] = S::load(x + t * stride + k);
      for (int r = 0; r < 4; r++) {
        const auto weights = S::load(tile + r * kColumns + k);
        for (int t = 0; t < M; t++) part[t][r] = S::accumulate(part[t][r], weights, at[t]);
      }
    }
    for (int t = 0; t < M; t++) S::sum4(part[t][0], part[t][1], part[t][2], part[t][3], out[t]);
  }

  // Where a tile lies, and what its rows need after the multiplication.
  struct Tile {
    int64_t n, count, word, words;
    float scale[kRows];
    int32_t sum[kRows];  // of the weights of a row, when kFixedOffset is not the zero point
  };

  template <int M>
  static void multiply_tokens(const Call& c, const Tile& at, const Element* tile, int64_t m) {
    const Weight& w = c.weight;
    const int64_t stride = w.words * 64;
    const Element* x = (const Element*)c.workspace + m * stride + at.word * 64;
    const RowScale* scales = (const RowScale*)(c.workspace + x_bytes(w, c.m));
    for (int64_t first = 0; first < at.count; first += 4) {
      int32_t out[M][4];
      multiply<M>(tile + first * kColumns, x, stride, at.words * 64, out);
      const int64_t last = std::min(at.count, first + 4);
      for (int t = 0; t < M; t++) {
        const RowScale& row = scales[m + t];
        float* y = c.y + (m + t) * w.rows + at.n;
        for (int64_t r = first; r < last; r++) {
          const float before = at.word ? y[r] : c.bias ? c.bias[at.n + r] : 0.0f;
          int32_t product = out[t][r - first];
          if (S::kFixedOffset >= 0) product += (S::kFixedOffset - row.zero_point) * at.sum[r];
          y[r] = before + (float)product * (row.scale * at.scale[r]);
        }
      }
    }
  }

  static void unpack_tile(const Weight& w, const int8_t** value, Tile& at, Element* tile) {
    const int64_t block = at.word / w.block_words;
    for (int64_t r = 0; r < at.count; r++) {
      const uint64_t* bits = w.bitmask + (at.n + r) * w.words + at.word;
      Element* to = tile + r * kColumns;
      S::prefetch((const char*)value[r] + 1024);
      for (int64_t i = 0; i < at.words; i++) value[r] = S::unpack(value[r], bits[i], to + i * 64);
      at.scale[r] = w.scales[(at.n + r) * w.blocks + block];
      if (S::kFixedOffset >= 0) {
        at.sum[r] = 0;
        for (int64_t k = 0; k < at.words * 64; k++) at.sum[r] += to[k];
      }
    }
  }

  static void rows(const Call& c, int64_t begin, int64_t end) {
    const Weight& w = c.weight;
    alignas(64) Element tile[kRows * kColumns];
    for (int64_t n = begin; n < end; n += kRows) {
      Tile at = {};
      at.n = n;
      at.count = std::min(kRows, end - n);
      std::fill(tile + at.count * kColumns, tile + kRows * kColumns, (Element)0);
      const int8_t* value[kRows] = {};
      for (int64_t r = 0; r < at.count; r++)
        value[r] = (const int8_t*)w.values + w.row_offsets[n + r];
      for (at.word = 0; at.word < w.words; at.word += at.words) {
        // A tile ends where the scale changes.
        const int64_t block_end = (at.word / w.block_words + 1) * w.block_words;
        at.words = std::min({kWords, block_end - at.word, w.words - at.word});
        unpack_tile(w, value, at, tile);
        int64_t m = 0;
        for (; m + S::kTokens <= c.m; m += S::kTokens)
          multiply_tokens<S::kTokens>(c, at, tile, m);
        for (; m < c.m; m++) multiply_tokens<1>(c, at, tile, m);
      }
    }
    if (w.words) return;
    for (int64_t m = 0; m < c.m; m++)
      for (int64_t n = begin; n < end; n++) c.y[m * w.rows + n] = c.bias ? c.bias[n] : 0.0f;
  }

  static int64_t step(const Weight&, int64_t) { return kRows; }
};

}  // namespace zs
