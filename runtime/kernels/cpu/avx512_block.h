// A few rows of W times a few rows of x ("tokens"): what the dot and the tile kernels share.
//
// x is laid out in blocks of tokens, each [words][tokens][64 columns] in the lane order of the
// values and padded with zeros, so that a block of registers reads it from front to back.
#pragma once

#include <algorithm>

#include "avx512_values.h"

namespace zs {
namespace avx512 {

// m tokens as `count` blocks of `size`; the last may be padded.
struct TokenBlocks {
  int64_t count;
  int64_t size;
};

inline size_t panel_bytes(const Weight& w, const TokenBlocks& blocks) {
  return (size_t)(blocks.count * blocks.size * w.words) * 64 * sizeof(float);
}

inline const float* panel(const Call& c, const TokenBlocks& blocks, int64_t block) {
  return (const float*)c.workspace + block * blocks.size * c.weight.words * 64;
}

// Lays out one token of the padded m.
inline void arrange_token(const Call& c, const TokenBlocks& blocks, int64_t token) {
  const Weight& w = c.weight;
  const int64_t block = token / blocks.size;
  float* out = (float*)c.workspace + (block * blocks.size * w.words + token % blocks.size) * 64;
  with_values(w, [&](auto values) {
    for (int64_t i = 0; i < w.words; i++) {
      const bool padding = token >= c.m;
      const float* x = padding ? c.x : c.x + token * w.columns + i * 64;
      arrange_columns<decltype(values)::kOrder>(x, padding ? 0 : w.columns - i * 64,
                                                out + i * blocks.size * 64);
    }
  });
}

// Adds the products over words [begin, end) to sums; bits[r] is the bitmask of a row, values[r] its
// values at `begin`, which moves on; `even` is that of the weight, or false. `prefetch(r, p)` is called before the values at p are read.
template <class Values, bool even, int rows, int tokens, class Prefetch>
inline void multiply_words(const Weight& w, const int64_t (&row)[rows],
                           const typename Values::Element* (&values)[rows], const float* x,
                           int64_t begin, int64_t end, __m512 (&sums)[rows][tokens],
                           Prefetch&& prefetch) {
  const uint64_t* bits[rows];
  float scale[rows];
  unroll<rows>([&](auto r) {
    bits[r] = w.bitmask + row[r] * w.words;
    scale[r] = 1;
  });
  for (int64_t i = begin; i < end;) {
    int64_t block_end = end;
    if (w.blocks > 1) {
      const int64_t block = i / w.block_words;
      block_end = std::min(end, (block + 1) * w.block_words);
      unroll<rows>([&](auto r) { scale[r] = w.scales[row[r] * w.blocks + block]; });
    }
    for (; i < block_end; i++, x += tokens * 64)
      unroll<rows>([&](auto r) {
        const uint64_t word = bits[r][i];
        prefetch(r, values[r]);
        __m512 v[4];
        Values::template expand<even>(values[r], word, scale[r], v);
        values[r] += kept_before<even, 64>(word);
        unroll<4>([&](auto q) {
          unroll<tokens>([&](auto t) {
            sums[r][t] = _mm512_fmadd_ps(v[q], _mm512_load_ps(x + t * 64 + q * 16), sums[r][t]);
          });
        });
      });
  }
}

}  // namespace avx512
}  // namespace zs
