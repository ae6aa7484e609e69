// Few rows of x: four rows of W at a time, expanded in registers and multiplied with x from cache.
#include "avx512_block.h"

namespace zs {
namespace {

using namespace avx512;

constexpr int kRows = 4, kMaxTokens = 4;
constexpr int64_t kMaxM = 8;
constexpr int64_t kPrefetchBytes = 2048;  // ahead of each row: hides the latency of memory

TokenBlocks token_blocks(int64_t m) {
  const int64_t count = (m + kMaxTokens - 1) / kMaxTokens;
  return {count, (m + count - 1) / count};
}

bool serves(const Weight& w, int64_t m, int32_t level) {
  return m <= kMaxM && !(w.type == ZS_INT8 && level == 4);
}

size_t workspace(const Weight& w, int64_t m) { return panel_bytes(w, token_blocks(m)); }

int64_t prepare_tasks(const Weight&, int64_t m) {
  const TokenBlocks blocks = token_blocks(m);
  return blocks.count * blocks.size;
}

void prepare(const Call& c, int64_t token) { arrange_token(c, token_blocks(c.m), token); }

int64_t row_step(const Weight&, int64_t) { return kRows; }

// Follows one row a fixed distance ahead; at its end it goes on in the row that is read next.
struct Lookahead {
  uintptr_t last;  // from here on, the distance leads beyond the row
  uintptr_t jump;  // from the end of the row to the next one

  uintptr_t operator()(const void* p) const {
    const uintptr_t at = (uintptr_t)p;
    return at + kPrefetchBytes + (at >= last ? jump : 0);
  }
};

// Rows [n, end) of W, kRows at most, times the tokens of one block.
template <class Values, bool even, int tokens>
void multiply_rows(const Call& c, const float* x, int64_t first_token, int64_t n, int64_t end) {
  const Weight& w = c.weight;
  const int lines = lines_per_word(w);
  using Element = typename Values::Element;
  const Element* all = (const Element*)w.values;
  int64_t row[kRows];
  const Element* values[kRows];
  Lookahead ahead[kRows];
  __m512 sums[kRows][tokens];
  unroll<kRows>([&](auto r) {
    row[r] = std::min(n + r, end - 1);  // the last row again where there are fewer than kRows
    values[r] = all + w.row_offsets[row[r]];
    const uintptr_t row_end = (uintptr_t)(all + w.row_offsets[row[r] + 1]);
    const uintptr_t next = (uintptr_t)(all + w.row_offsets[std::min(row[r] + kRows, w.rows)]);
    ahead[r] = {row_end - kPrefetchBytes, next - row_end};
    unroll<tokens>([&](auto t) { sums[r][t] = _mm512_setzero_ps(); });
  });
  multiply_words<Values, even, kRows, tokens>(
      w, row, values, x, 0, w.words, sums,
      [&](int r, const Element* p) { prefetch_lines(ahead[r](p), lines); });

  const __mmask8 valid = (__mmask8)first_lanes(end - n);
  const __m128 bias = c.bias ? _mm_maskz_loadu_ps(valid, c.bias + n) : _mm_setzero_ps();
  unroll<tokens>([&](auto t) {
    if (first_token + t >= c.m) return;
    __m128 y = sum_lanes(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
    if (Values::kRowScale) y = _mm_mul_ps(y, _mm_maskz_loadu_ps(valid, w.scales + n));
    _mm_mask_storeu_ps(c.y + (first_token + t) * w.rows + n, valid, _mm_add_ps(y, bias));
  });
}

template <class Values, bool even, int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end) {
  const TokenBlocks blocks = token_blocks(c.m);
  for (int64_t n = begin; n < end; n += kRows)
    for (int64_t b = 0; b < blocks.count; b++)
      multiply_rows<Values, even, tokens>(c, panel(c, blocks, b), b * tokens, n,
                                          std::min(end, n + kRows));
}

template <bool even>
void rows_of(const Call& c, int64_t begin, int64_t end) {
  with_values(c.weight, [&](auto values) {
    using Values = decltype(values);
    switch (token_blocks(c.m).size) {
      case 1: return all_rows<Values, even, 1>(c, begin, end);
      case 2: return all_rows<Values, even, 2>(c, begin, end);
      case 3: return all_rows<Values, even, 3>(c, begin, end);
      default: return all_rows<Values, even, 4>(c, begin, end);
    }
  });
}

void rows(const Call& c, int64_t begin, int64_t end) {
  return c.weight.even ? rows_of<true>(c, begin, end) : rows_of<false>(c, begin, end);
}

// Fitted to one thread of a Xeon with AVX-512 at 2.2 GHz, density 0.1 and 0.5, 1 to 8 tokens:
// compute to a 3072 x 768 weight in cache, memory to 4096 x 4096 weights in turn, larger than the
// caches. float16 was taken as float32. Other work was running on the machine.
double cost(const Weight& w, int64_t m) {
  const TokenBlocks blocks = token_blocks(m);
  const bool wide = w.type == ZS_FLOAT32 || w.type == ZS_FLOAT16;  // 16 columns for an expansion
  const double per_word = (wide ? 18 : 10.5) - (w.even ? 2 : 0) + (w.blocks > 1 ? 4 : 0) +
                          (wide ? 2.6 : 3.2) * (double)m + 8 * (double)(blocks.count - 1);
  const double compute = (double)(w.rows * w.words) * per_word;
  const double memory = stored_bytes(w) / kBytesPerCycle;
  const double prepare = (double)w.words * (double)m * 25, store = (double)w.rows * (double)m * 5;
  return std::max(compute, memory) + 0.2 * std::min(compute, memory) + prepare + store;
}

}  // namespace

extern const Path avx512_dot = {
    "avx512-dot",  kAvx512, 0,        false /* zeros are multiplied */,
    serves,        cost,    nullptr,  workspace,
    prepare_tasks, prepare, row_step, rows};

}  // namespace zs
