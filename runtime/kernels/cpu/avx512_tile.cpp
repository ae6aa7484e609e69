// Some rows of x: one row of W at a time, expanded in registers and multiplied with many tokens.
//
// Each expanded register is used for up to kMaxTokens tokens. The columns are cut so that their
// part of x stays in the first-level cache while many rows of W pass; between two parts the sums
// wait in a buffer. Measured slower from 16 tokens on: two rows of W with at most 10 tokens, which
// load x half as often but expand twice as often.
#include "avx512_block.h"

namespace zs {
namespace {

using namespace avx512;

constexpr int kMinTokens = 6, kMaxTokens = 16;
constexpr int kRowBlock = 32;              // rows of W that pass over one part of x
constexpr int kRowsAhead = 3;              // prefetched: hides the latency of memory
constexpr int64_t kPartBytes = 32 * 1024;  // of x in the first-level cache

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
        for (int64_t r = 0; r < count; r++) {
          const int64_t row[1] = {n + r};
          const Element* values[1] = {position[r]};
          // The rows behind the last of the block are its first ones, which then stand at what they
          // need next: the prefetch runs on through parts, blocks of tokens and blocks of rows.
          const uintptr_t ahead =
              (uintptr_t)position[(r + kRowsAhead) % kRowBlock] - (uintptr_t)position[r];
          __m512 registers[1][tokens];
          unroll<tokens>([&](auto t) {
            registers[0][t] = i ? _mm512_load_ps(sums.lanes[r][t]) : _mm512_setzero_ps();
          });
          multiply_words<Values, false, 1, tokens>(
              w, row, values, x + i * tokens * 64, i, part_end, registers,
              [&](int, const Element* p) { prefetch_lines(ahead + (uintptr_t)p, lines); });
          position[r] = part_end < w.words ? values[0] : row_start(next_n + r);
          unroll<tokens>([&](auto t) { _mm512_store_ps(sums.lanes[r][t], registers[0][t]); });
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

// Fitted to one thread of a Xeon with AVX-512 at 2.2 GHz, density 0.5, 6 to 32 tokens: compute to a
// 3072 x 768 weight in cache, the share of memory time that is not hidden to 4096 x 4096 weights in
// turn, larger than the caches. float16 was taken as float32. Other work ran on the machine.
double cost(const Weight& w, int64_t m) {
  const TokenBlocks blocks = token_blocks(m);
  const bool wide = w.type == ZS_FLOAT32 || w.type == ZS_FLOAT16;  // 16 columns for an expansion
  const double per_block = (wide ? 26 : 16) + (w.blocks > 1 ? 4 : 0) + 2.8 * (double)blocks.size;
  const double tokens = (double)(blocks.count * blocks.size);
  const double compute = (double)(w.rows * w.words) * per_block * (double)blocks.count;
  const double memory = stored_bytes(w) / kBytesPerCycle;
  const double prepare = (double)w.words * tokens * 25, store = (double)w.rows * tokens * 5;
  return std::max(compute, memory) + 0.5 * std::min(compute, memory) + prepare + store;
}

}  // namespace

extern const Path avx512_tile = {
    "avx512-tile", kAvx512, 0,        false /* zeros are multiplied */,
    serves,        cost,    nullptr,  workspace,
    prepare_tasks, prepare, row_step, rows};

}  // namespace zs
