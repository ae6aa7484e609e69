// Rows of x in 8 bits, with AVX-512.
#include "avx512_quantize.h"

#include <cstring>

namespace zs {
namespace avx512 {
namespace {

__mmask16 first_lanes(int64_t count) {
  if (count <= 0) return 0;
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

}  // namespace

RowScale find_row_scale(const float* x, int64_t columns) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  __m512 low[4], high[4];
  for (int j = 0; j < 4; j++) low[j] = high[j] = _mm512_setzero_ps();
  uint32_t special = 0;
  const auto add = [&](__m512 value, int j) {
    low[j] = _mm512_min_ps(low[j], value);
    high[j] = _mm512_max_ps(high[j], value);
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), exponent);
    special |= _mm512_cmpeq_epi32_mask(bits, exponent);
  };
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64)
    for (int j = 0; j < 4; j++) add(_mm512_loadu_ps(x + k + 16 * j), j);
  for (; k < columns; k += 16) add(_mm512_maskz_loadu_ps(first_lanes(columns - k), x + k), 0);
  if (special) return {std::numeric_limits<float>::quiet_NaN(), 0};
  for (int j = 1; j < 4; j++) {
    low[0] = _mm512_min_ps(low[0], low[j]);
    high[0] = _mm512_max_ps(high[0], high[j]);
  }
  return row_scale(_mm512_reduce_min_ps(low[0]), _mm512_reduce_max_ps(high[0]));
}

RowScale quantize_row(const float* x, int64_t columns, uint8_t* q) {
  const int64_t padded = (columns + 63) / 64 * 64;
  const RowScale row = find_row_scale(x, columns);
  if (std::isnan(row.scale)) {
    memset(q, 0, (size_t)padded);
    return row;
  }
  const Rounder round(row);
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16)
    _mm_storeu_si128((__m128i*)(q + k), round(_mm512_loadu_ps(x + k)));
  for (; k < padded; k += 16) {
    const __mmask16 valid = first_lanes(columns - k);
    const __m512 tail = columns > k ? _mm512_maskz_loadu_ps(valid, x + k) : _mm512_setzero_ps();
    _mm_storeu_si128((__m128i*)(q + k), _mm_maskz_mov_epi8(valid, round(tail)));
  }
  return row;
}

}  // namespace avx512
}  // namespace zs
