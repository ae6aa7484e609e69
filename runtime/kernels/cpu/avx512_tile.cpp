// Some rows of x: two rows of W at a time, expanded in registers and multiplied with many tokens.
//
// Each expanded register is used for up to kMaxTokens tokens. The columns are cut so that their part
// of x stays in the first-level cache while many rows of W pass; between two parts the sums wait in a
// buffer. One row of W with twice the tokens expands half as often, but was slower: it then loads x
// once for each multiplication.
#include "avx512_block.h"

namespace zs {
namespace {

using namespace avx512;

constexpr int kMinTokens = 6, kMaxTokens = 10;  // 20 sums, 8 expanded registers, 1 of x
constexpr int kRowBlock = 32;                   // rows of W that pass over one part of x
constexpr int kRowsAhead = 4;                   // prefetched: hides the latency of memory
constexpr int64_t kPartBytes = 32 * 1024;       // of x in the first-level cache

// Blocks of an even number of tokens.
TokenBlocks token_blocks(int64_t m) {
  const int64_t count = (m + kMaxTokens - 1) / kMaxTokens;
  const int64_t size = (m + count - 1) / count;
  return {count, std::max<int64_t>(kMinTokens, (size + 1) / 2 * 2)};
}

bool serves(const Weight& w, int64_t, int32_t level) { return !(w.type == ZS_INT8 && level == 4); }

size_t workspace(const Weight& w, int64_t m) { return panel_bytes(w, token_blocks(m)); }

int64_t prepare_tasks(const Weight&, int64_t m) {
  const TokenBlocks blocks = token_blocks(m);
  return blocks.count * blocks.size;
}

void prepare(const Call& c, int64_t token) { arrange_token(c, token_blocks(c.m), token); }

int64_t row_step(const Weight&, int64_t) { return kRowBlock; }

// The sums of kRowBlock rows with the tokens of one block, lane by lane.
template <int tokens>
struct Sums {
  alignas(64) float lanes[kRowBlock][tokens][16];
};

// y of rows [n, n + count), count <= kRowBlock.
template <class Values, int tokens>
void store_sums(const Call& c, const Sums<tokens>& sums, int64_t first_token, int64_t n,
                int64_t count) {
  const Weight& w = c.weight;
  for (int64_t r = 0; r < count; r += 4) {
    const __mmask8 valid = (__mmask8)(first_lanes(count - r) & 15);
    const __m128 bias = c.bias ? _mm_maskz_loadu_ps(valid, c.bias + n + r) : _mm_setzero_ps();
    const __m128 scale =
        Values::kRowScale ? _mm_maskz_loadu_ps(valid, w.scales + n + r) : _mm_set1_ps(1);
    const int64_t last = std::min<int64_t>(tokens, c.m - first_token);
    for (int64_t t = 0; t < last; t++) {
      const auto lanes = [&](int64_t i) {
        return _mm512_load_ps(sums.lanes[std::min(r + i, count - 1)][t]);
      };
      __m128 y = sum_lanes(lanes(0), lanes(1), lanes(2), lanes(3));
      y = _mm_fmadd_ps(y, scale, bias);
      _mm_mask_storeu_ps(c.y + (first_token + t) * w.rows + n + r, valid, y);
    }
  }
}

template <class Values, int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  using Element = typename Values::Element;
  const Element* all = (const Element*)w.values;
  constexpr int64_t part_words = kPartBytes / (tokens * 64 * (int64_t)sizeof(float));
  const TokenBlocks blocks = token_blocks(c.m);
  const int lines = lines_per_word(w);
  Sums<tokens> sums;
  const Element* position[kRowBlock];  // where each row of the block goes on
  const auto row_start = [&](int64_t n) { return all + w.row_offsets[std::min(n, w.rows)]; };
  for (int64_t r = 0; r < kRowBlock; r++) position[r] = row_start(begin + r);
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t count = std::min<int64_t>(kRowBlock, end - n);
    for (int64_t b = 0; b < blocks.count; b++) {
      const float* x = panel(c, blocks, b);
      const int64_t next_n = b + 1 < blocks.count ? n : n + kRowBlock;
      for (int64_t i = 0; i < std::max<int64_t>(1, w.words); i += part_words) {
        const int64_t part_end = std::min(w.words, i + part_words);
        for (int64_t r = 0; r < count; r += 2) {
          const int64_t pair[2] = {r, std::min(r + 1, count - 1)};  // an odd last row goes twice
          const int64_t row[2] = {n + pair[0], n + pair[1]};
          const Element* values[2] = {position[pair[0]], position[pair[1]]};
          // The rows behind the last of the block are its first ones, which then stand at what they
          // need next: the prefetch runs on through parts, blocks of tokens and blocks of rows.
          uintptr_t ahead[2];
          __m512 registers[2][tokens];
          unroll<2>([&](auto j) {
            ahead[j] = (uintptr_t)position[(r + j + kRowsAhead) % kRowBlock] - (uintptr_t)values[j];
            unroll<tokens>([&](auto t) {
              registers[j][t] = i ? _mm512_load_ps(sums.lanes[r + j][t]) : _mm512_setzero_ps();
            });
          });
          multiply_words<Values, 2, tokens>(
              w, row, values, x + i * tokens * 64, i, part_end, registers,
              [&](int j, const Element* p) { prefetch_lines(ahead[j] + (uintptr_t)p, lines); });
          unroll<2>([&](auto j) {
            position[pair[j]] = part_end < w.words ? values[j] : row_start(next_n + pair[j]);
            unroll<tokens>([&](auto t) { _mm512_store_ps(sums.lanes[r + j][t], registers[j][t]); });
          });
        }
      }
      store_sums<Values, tokens>(c, sums, b * tokens, n, count);
    }
  }
}

// Finds the instance for a block size among kMinTokens, kMinTokens + 2 .. kMaxTokens.
template <class Values, int tokens>
void dispatch(const Call& c, int64_t size, int64_t begin, int64_t end) {
  if (size == tokens) return all_rows<Values, tokens>(c, begin, end);
  if constexpr (tokens < kMaxTokens) dispatch<Values, tokens + 2>(c, size, begin, end);
}

void rows(const Call& c, int64_t begin, int64_t end) {
  with_values(c.weight, [&](auto values) {
    dispatch<decltype(values), kMinTokens>(c, token_blocks(c.m).size, begin, end);
  });
}

double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.words * (double)m * 20;  // TODO
}

}  // namespace

extern const Path avx512_tile = {
    "avx512-tile", kAvx512, 0,        false /* zeros are multiplied */,
    serves,        cost,    nullptr,  workspace,
    prepare_tasks, prepare, row_step, rows};

}  // namespace zs
