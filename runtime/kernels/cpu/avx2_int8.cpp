// The AVX2 kernels for 8-bit activations: 16-bit products, which cannot saturate.
#include <immintrin.h>

#include "avx2_values.h"
#include "simd_int8.h"

namespace zs {
namespace {

struct Avx2Int8 {
  using Element = int16_t;
  using Sum = __m256i;
  static constexpr int kTokens = 2, kStep = 16, kFixedOffset = -1;

  static Sum zero() { return _mm256_setzero_si256(); }

  static Sum load(const int16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static Sum accumulate(Sum sum, Sum w, Sum x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  }

  static void sum4(Sum a, Sum b, Sum c, Sum d, int32_t* out) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i low = _mm256_castsi256_si128(all), high = _mm256_extracti128_si256(all, 1);
    _mm_storeu_si128((__m128i*)out, _mm_add_epi32(low, high));
  }

  static const int8_t* unpack(const int8_t* value, uint64_t bits, int16_t* to) {
    for (int i = 0; i < 64; i += 16) {
      const uint32_t low = bits >> i & 255, high = bits >> (i + 8) & 255;
      const __m128i a = expand(value, low);
      value += _mm_popcnt_u32(low);
      const __m128i b = expand(value, high);
      value += _mm_popcnt_u32(high);
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(a, b));
      _mm256_storeu_si256((__m256i*)(to + i), wide);
    }
    return value;
  }

  static __m128i expand(const int8_t* value, uint32_t byte) {
    const __m128i lanes = _mm_loadl_epi64((const __m128i*)avx2::kByteLanes.of[byte]);
    return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)value), lanes);
  }

  static RowScale range(const float* x, int64_t columns) {
    __m256 low = _mm256_setzero_ps(), high = low;
    __m256i exponent = _mm256_setzero_si256();
    const __m256i all_ones = _mm256_set1_epi32(0x7f800000);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
      const __m256 v = _mm256_loadu_ps(x + k);
      low = _mm256_min_ps(low, v);
      high = _mm256_max_ps(high, v);
      const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), all_ones);
      exponent = _mm256_or_si256(exponent, _mm256_cmpeq_epi32(bits, all_ones));
    }
    float lows[8], highs[8];
    _mm256_storeu_ps(lows, low);
    _mm256_storeu_ps(highs, high);
    bool finite = _mm256_testz_si256(exponent, exponent);
    for (int i = 1; i < 8; i++) {
      lows[0] = std::min(lows[0], lows[i]);
      highs[0] = std::max(highs[0], highs[i]);
    }
    for (; k < columns; k++) {
      lows[0] = std::min(lows[0], x[k]);
      highs[0] = std::max(highs[0], x[k]);
      finite &= std::isfinite(x[k]);
    }
    if (!finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
    return row_scale(lows[0], highs[0]);
  }

  static void quantize_row(const float* x, int64_t columns, const RowScale& row, int32_t offset,
                           int16_t* to) {
    const __m256 scale = _mm256_set1_ps(row.scale), zero = _mm256_set1_ps((float)row.zero_point);
    const __m256 lowest = _mm256_setzero_ps(), highest = _mm256_set1_ps(255.0f);
    const __m256i offsets = _mm256_set1_epi32(offset);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
      const __m256 steps = _mm256_round_ps(_mm256_div_ps(_mm256_loadu_ps(x + k), scale),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256 q = _mm256_min_ps(highest, _mm256_max_ps(lowest, _mm256_add_ps(steps, zero)));
      const __m256i v = _mm256_sub_epi32(_mm256_cvttps_epi32(q), offsets);
      const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
      _mm_storeu_si128((__m128i*)(to + k), _mm_packs_epi32(low, high));
    }
    for (; k < columns; k++) to[k] = (int16_t)((int32_t)quantize(x[k], row) - offset);
  }

  static void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }
};

using Loops = SimdInt8<Avx2Int8>;

// Fitted to one thread of a Zen 3 beside other work, as all costs of the AVX2 kernels: cycles of
// 4096 x 4096 weights in turn, larger than the caches.
double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.columns * (0.8 + 0.1 * (double)m);
}

// ---- Few rows of x: four rows of W expanded in registers, without a tile in memory. ----

constexpr int kMaxTokens = 4;
constexpr int64_t kPrefetchBytes = 1024;
// A sum grows by up to 2 * 255 * 128 * 256 for each 16 columns: after 16 words it is divided by 256.
constexpr int64_t kSumWords = 16;

bool dot_serves(const Weight& w, int64_t m, int32_t level) {
  return Loops::serves(w, m, level) && m <= 2 * kMaxTokens;
}

// 256 times the next 16 columns of a row: 8 begin at `low`, 8 at `high`.
__m256i expand16(const int8_t* low, const int8_t* high, uint32_t first, uint32_t second) {
  const __m256i values = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
      _mm_loadu_si128((const __m128i*)high), 1);
  const __m256i lanes = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_load_si128((const __m128i*)avx2::kHighLanes.of[first])),
      _mm_load_si128((const __m128i*)avx2::kHighLanes.of[second]), 1);
  return _mm256_shuffle_epi8(values, lanes);
}

template <int rows, int tokens>
void multiply(const Call& c, int64_t n, int64_t m) {
  const Weight& w = c.weight;
  const int64_t stride = w.words * 64;
  const int16_t* const x = (const int16_t*)c.workspace + m * stride;
  const RowScale* const scales = (const RowScale*)(c.workspace + Loops::x_bytes(w, c.m)) + m;
  const int8_t* value[rows];
  const uint8_t* bits[rows];
  float y[rows][tokens];
  for (int r = 0; r < rows; r++) {
    value[r] = (const int8_t*)w.values + w.row_offsets[n + r];
    bits[r] = (const uint8_t*)(w.bitmask + (n + r) * w.words);
    for (int t = 0; t < tokens; t++) y[r][t] = c.bias ? c.bias[n + r] : 0.0f;
  }
  for (int64_t word = 0; word < w.words;) {
    // Sums end where the scale changes.
    const int64_t block = word / w.block_words;
    const int64_t end = std::min({word + kSumWords, w.words, (block + 1) * w.block_words});
    __m256i sum[rows][tokens];
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < tokens; t++) sum[r][t] = _mm256_setzero_si256();
    for (; word < end; word++) {
      for (int r = 0; r < rows; r++)
        _mm_prefetch((const char*)value[r] + kPrefetchBytes, _MM_HINT_T0);
      ZS_UNROLL
      for (int i = 0; i < 4; i++) {
        const int16_t* const at = x + word * 64 + i * 16;
        ZS_UNROLL
        for (int r = 0; r < rows; r++) {
          const uint32_t first = bits[r][word * 8 + 2 * i], second = bits[r][word * 8 + 2 * i + 1];
          const int8_t* const middle = value[r] + _mm_popcnt_u32(first);
          const __m256i v = expand16(value[r], middle, first, second);
          value[r] = middle + _mm_popcnt_u32(second);
          ZS_UNROLL
          for (int t = 0; t < tokens; t++) {
            const __m256i x_t = _mm256_loadu_si256((const __m256i*)(at + t * stride));
            sum[r][t] = _mm256_add_epi32(sum[r][t], _mm256_madd_epi16(v, x_t));
          }
        }
      }
    }
    for (int r = 0; r < rows; r++) {
      const float scale = w.scales[(n + r) * w.blocks + block];
      for (int t = 0; t < tokens; t++) {
        const __m256i exact = _mm256_srai_epi32(sum[r][t], 8);
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(exact),
                                     _mm256_extracti128_si256(exact, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        y[r][t] += (float)_mm_cvtsi128_si32(half) * (scales[t].scale * scale);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) c.y[(m + t) * w.rows + n + r] = y[r][t];
}

template <int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end, int64_t m) {
  constexpr int rows = tokens == 1 ? 4 : 2;  // what fits into 16 registers
  int64_t n = begin;
  for (; n + rows <= end; n += rows) multiply<rows, tokens>(c, n, m);
  for (; n < end; n++) multiply<1, tokens>(c, n, m);
}

void dot_rows(const Call& c, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + kMaxTokens <= c.m; m += kMaxTokens) all_rows<kMaxTokens>(c, begin, end, m);
  switch (c.m - m) {
    case 1: return all_rows<1>(c, begin, end, m);
    case 2: return all_rows<2>(c, begin, end, m);
    case 3: return all_rows<3>(c, begin, end, m);
  }
}

int64_t dot_step(const Weight&, int64_t) { return 4; }

double dot_cost(const Weight& w, int64_t m) {
  const double blocks = (double)((m + kMaxTokens - 1) / kMaxTokens);
  return (double)w.rows * (double)w.columns * (0.43 * blocks + 0.05 * (double)m);
}

}  // namespace

extern const Path avx2_int8 = {"avx2-int8",
                               kAvx2,
                               0,
                               false,
                               Loops::serves,
                               cost,
                               nullptr,
                               Loops::workspace,
                               Loops::prepare_tasks,
                               Loops::prepare,
                               Loops::step,
                               Loops::rows};

extern const Path avx2_int8_dot = {"avx2-int8-dot",
                                   kAvx2,
                                   0,
                                   false,
                                   dot_serves,
                                   dot_cost,
                                   nullptr,
                                   Loops::workspace,
                                   Loops::prepare_tasks,
                                   Loops::prepare,
                                   dot_step,
                                   dot_rows};

}  // namespace zs
