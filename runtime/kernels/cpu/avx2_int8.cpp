// The AVX2 kernel for 8-bit activations: 16-bit products, which cannot saturate.
#include <immintrin.h>

#include "path.h"
#include "simd_int8.h"

namespace zs {
namespace {

// For each byte of a bitmask: which of the next 8 values goes to each lane; 0x80 makes a zero.
struct ExpandTable {
  alignas(64) uint8_t lanes[256][8];
};

constexpr ExpandTable make_table() {
  ExpandTable table = {};
  for (int byte = 0; byte < 256; byte++) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; lane++)
      table.lanes[byte][lane] = byte >> lane & 1 ? next++ : (uint8_t)0x80;
  }
  return table;
}

constexpr ExpandTable kExpand = make_table();

struct Avx2Int8 {
  using Element = int16_t;
  using Sum = __m256i;
  static constexpr int kTokens = 2, kStep = 16, kFixedOffset = -1;

  static Sum zero() { return _mm256_setzero_si256(); }

  static Sum accumulate(Sum sum, const int16_t* w, const int16_t* x) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)w);
    const __m256i b = _mm256_loadu_si256((const __m256i*)x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
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
    const __m128i lanes = _mm_loadl_epi64((const __m128i*)kExpand.lanes[byte]);
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

// Cycles, estimated from the instructions of the loops.
double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.columns * (0.3 + 0.1 * (double)m);
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

}  // namespace zs
