// int8 values with 8-bit activations for few rows of x, with VNNI: the weights are the traffic.
#include <immintrin.h>

#include <algorithm>

#include "avx512_quantize.h"
#include "path.h"

namespace zs {
namespace {

constexpr int kRows = 4;    // rows of W that run together, to hide the latency of the expansion
constexpr int kTokens = 4;  // rows of x that share an expansion
constexpr int64_t kMostTokens = 8;

// Sums of 32 bits hold this many words of products: 255 * 128 * 64 * 512 < 2^31.
constexpr int64_t kExactWords = 512;

// The workspace: a RowScale for every row of x, then the rows in 8 bits, padded with zeros.
int64_t scales_bytes(int64_t m) { return (m * (int64_t)sizeof(RowScale) + 63) / 64 * 64; }

const uint8_t* quantized(const Call& c) { return (const uint8_t*)c.workspace + scales_bytes(c.m); }

size_t workspace(const Weight& w, int64_t m) {
  return (size_t)(scales_bytes(m) + m * w.words * 64);
}

int64_t prepare_tasks(const Weight&, int64_t m) { return m; }

void prepare(const Call& c, int64_t m) {
  const Weight& w = c.weight;
  uint8_t* q = (uint8_t*)c.workspace + scales_bytes(c.m) + m * w.words * 64;
  ((RowScale*)c.workspace)[m] = avx512::quantize_row(c.x + m * w.columns, w.columns, q);
}

// Element i is the sum of v[i].
__m128 sum_lanes(const __m512 (&v)[4]) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 low = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
  const __m512 high = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  const __m512 sum = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Prefetches this many bytes of values ahead, in whole groups of rows, so that the distance is the
// same for short rows and long ones.
constexpr int64_t kAhead = 6144;

int64_t rows_ahead(const Weight& w) {
  const int64_t group = (int64_t)((double)(kRows * w.columns) * w.density) + 1;
  return kRows * std::max<int64_t>(1, kAhead / group);
}

// A line of values lasts for several words of bitmask: prefetches are for the words of which these
// bits are 0.
int64_t prefetch_mask(const Weight& w) {
  return w.density > 0.6 ? 0 : w.density > 0.3 ? 1 : w.density > 0.15 ? 3 : 7;
}

// `Count` rows of W against `M` rows of x.
template <int Count, int M>
void dot(const Call& c, int64_t n, int64_t m, int64_t ahead) {
  const int64_t skipped = prefetch_mask(c.weight);
  const Weight& w = c.weight;
  const uint8_t* q = quantized(c) + m * w.words * 64;
  const RowScale* row = (const RowScale*)c.workspace + m;
  // One row of x: its zero point takes the place of the ones, so that the sum of the products with
  // it is what must be taken off.
  const __m512i ones = _mm512_set1_epi8(M == 1 ? (char)row->zero_point : 1);
  const uint64_t* bits[Count];
  const int8_t* values[Count];
  int64_t next[Count];
  for (int r = 0; r < Count; r++) {
    bits[r] = w.bitmask + (n + r) * w.words;
    values[r] = (const int8_t*)w.values + w.row_offsets[n + r];
    next[r] = w.row_offsets[std::min(n + r + ahead, w.rows)] - w.row_offsets[n + r];
  }
  const int64_t next_bits = std::min(ahead, w.rows - n - Count) * w.words * 8;

  __m512 total[M][4];
  for (int j = 0; j < M; j++)
    for (int r = 0; r < 4; r++) total[j][r] = _mm512_setzero_ps();
  for (int64_t block = 0; block < w.blocks; block++) {
    const int64_t last = std::min(w.words, (block + 1) * w.block_words);
    for (int64_t word = block * w.block_words; word < last;) {
      const int64_t stop = std::min(last, word + kExactWords);
      __m512i sum[Count][M], kept[Count];
      for (int r = 0; r < Count; r++) {
        kept[r] = _mm512_setzero_si512();
        for (int j = 0; j < M; j++) sum[r][j] = _mm512_setzero_si512();
      }
      for (; word < stop; word++) {
        __m512i x[M];
        for (int j = 0; j < M; j++) x[j] = _mm512_loadu_si512(q + (j * w.words + word) * 64);
        for (int r = 0; r < Count; r++) {
          const uint64_t mask = bits[r][word];
          const __m512i v =
              _mm512_maskz_expand_epi8((__mmask64)mask, _mm512_loadu_si512(values[r]));
          if ((word & skipped) == 0)
            _mm_prefetch((const char*)values[r] + next[r], _MM_HINT_T0);
          if (word % 8 == 0) _mm_prefetch((const char*)(bits[r] + word) + next_bits, _MM_HINT_T0);
          values[r] += _mm_popcnt_u64(mask);
          kept[r] = _mm512_dpbusd_epi32(kept[r], ones, v);
          for (int j = 0; j < M; j++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], x[j], v);
        }
      }
      for (int r = 0; r < Count; r++) {
        const __m512 scale = _mm512_set1_ps(w.scales[(n + r) * w.blocks + block]);
        for (int j = 0; j < M; j++) {
          const __m512i off =
              M == 1 ? kept[r]
                     : _mm512_mullo_epi32(kept[r], _mm512_set1_epi32(row[j].zero_point));
          const __m512 part = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][j], off));
          total[j][r] = _mm512_fmadd_ps(part, scale, total[j][r]);
        }
      }
    }
  }
  constexpr __mmask8 valid = (1 << Count) - 1;
  const __m128 bias = c.bias ? _mm_maskz_loadu_ps(valid, c.bias + n) : _mm_setzero_ps();
  for (int j = 0; j < M; j++) {
    const __m128 y = _mm_fmadd_ps(sum_lanes(total[j]), _mm_set1_ps(row[j].scale), bias);
    _mm_mask_storeu_ps(c.y + (m + j) * w.rows + n, valid, y);
  }
}

template <int Count>
void all_tokens(const Call& c, int64_t n, int64_t ahead) {
  int64_t m = 0;
  for (; m + kTokens <= c.m; m += kTokens) dot<Count, kTokens>(c, n, m, ahead);
  switch (c.m - m) {
    case 1: return dot<Count, 1>(c, n, m, ahead);
    case 2: return dot<Count, 2>(c, n, m, ahead);
    case 3: return dot<Count, 3>(c, n, m, ahead);
    default: return;
  }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const int64_t ahead = rows_ahead(c.weight);
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) all_tokens<kRows>(c, n, ahead);
  for (; n < end; n++) all_tokens<1>(c, n, ahead);
}

bool serves(const Weight& w, int64_t m, int32_t level) {
  return w.type == ZS_INT8 && level == 4 && m <= kMostTokens;
}

double cost(const Weight& w, int64_t m) {
  const double words = (double)w.rows * (double)w.words;
  const double passes = (double)((m + kTokens - 1) / kTokens);
  // Fitted to a Xeon: the expansion and its memory traffic, then products.
  return words * ((6 + 10 * w.density) * passes + 0.9 * (double)m);
}

int64_t row_step(const Weight&, int64_t) { return kRows; }

}  // namespace

extern const Path avx512_int8_dot = {
    "avx512-int8-dot", kAvx512 | kAvx512Vnni, 0,    false, serves, cost, nullptr, workspace,
    prepare_tasks,     prepare,               row_step, rows};

}  // namespace zs
