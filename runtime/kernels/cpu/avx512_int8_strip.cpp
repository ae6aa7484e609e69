// int8 values with 8-bit activations for many rows of x: what VNNI and AMX share.
#include "avx512_int8_strip.h"

#include <algorithm>

namespace zs {
namespace avx512 {
namespace {

constexpr int64_t kLeastTokens = 5;

// `Count` rows together, to hide the latency of the expansion.
template <int Count>
void expand_rows(const Weight& w, int64_t word, int64_t words, int64_t row, Int8Strip& s) {
  const __m512i ones = _mm512_set1_epi8(1);
  const uint64_t* bits[Count];
  const int8_t* values[Count];
  __m512i kept[Count];
  int64_t ahead[Count];  // to the same place of the next strip
  ZS_UNROLL
  for (int r = 0; r < Count; r++) {
    const int64_t n = s.first + row + r, next = std::min(n + kStripRows, w.rows);
    bits[r] = w.bitmask + n * w.words + word;
    values[r] = s.values[row + r];
    ahead[r] = w.row_offsets[next] - w.row_offsets[n];
    kept[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i += 8)
      _mm_prefetch((const char*)(bits[r] + (next - n) * w.words + i), _MM_HINT_T1);
  }
  int8_t* out = s.bytes[0][row];
  for (int64_t i = 0; i < words; i++, out += kStripRows * 64) {
    ZS_UNROLL
    for (int r = 0; r < Count; r++) {
      const uint64_t mask = bits[r][i];
      const __m512i v = _mm512_maskz_expand_epi8((__mmask64)mask, _mm512_loadu_si512(values[r]));
      _mm_prefetch((const char*)values[r] + ahead[r], _MM_HINT_T1);
      values[r] += _mm_popcnt_u64(mask);
      add_products(kept[r], ones, v);
      _mm512_store_si512(out + r * 64, v);
    }
  }
  ZS_UNROLL
  for (int r = 0; r < Count; r++) {
    s.values[row + r] = values[r];
    s.kept[row + r] += _mm512_reduce_add_epi32(kept[r]);
  }
}

}  // namespace

void expand_strip(const Weight& w, int64_t word, int64_t words, Int8Strip& s) {
  int64_t row = 0;
  for (; row + 4 <= s.count; row += 4) expand_rows<4>(w, word, words, row, s);
  for (; row < s.count; row++) expand_rows<1>(w, word, words, row, s);
}

bool strips_serve(const Weight& w, int64_t m, int32_t accuracy_level) {
  return w.type == ZS_INT8 && accuracy_level == 4 && m >= kLeastTokens;
}

double strips_cost(const Weight& w, int64_t m, double expansion, double product) {
  const double words = (double)w.rows * (double)w.words;
  const int64_t tiles = token_tiles(m);
  const double chunks = (double)((tiles + chunk_tiles(w) - 1) / chunk_tiles(w));
  const double out = (double)w.rows * (double)w.blocks * (double)tiles;
  return words * (expansion * chunks + product * (double)tiles) + 15 * out +
         2 * (double)m * (double)w.columns;
}

size_t strips_workspace(const Weight& w, int64_t m) { return ByteTiles::bytes(w, m); }

int64_t strips_prepare_tasks(const Weight&, int64_t m) { return token_tiles(m); }

int64_t strips_row_step(const Weight& w, int64_t m) {
  return token_tiles(m) > chunk_tiles(w) ? 4 * kStripRows : kStripRows;
}

}  // namespace avx512
}  // namespace zs
