// Rows of x in 8 bits, with AVX-512: the results of quantize.h, to the bit.
//
// Only files that are compiled for AVX-512 may include this.
#pragma once

#include <immintrin.h>

#include "quantize.h"

namespace zs {
namespace avx512 {

// The scale and zero point of a row of x.
RowScale find_row_scale(const float* x, int64_t columns);

// quantize_row, and zeros in q from `columns` to the next multiple of 64.
RowScale quantize_row(const float* x, int64_t columns, uint8_t* q);

// Rounds the elements of a row whose scale is not NaN.
//
// A division costs ten times a multiplication. The product with 1 / scale is within 1e-4 of the
// quotient, so that both round to the same integer unless they lie that close to a half.
class Rounder {
 public:
  explicit Rounder(const RowScale& row)
      : scale_(_mm512_set1_ps(row.scale)),
        inverse_(_mm512_set1_ps(1.0f / row.scale)),
        zero_(_mm512_set1_epi32(row.zero_point)) {}

  __m128i operator()(__m512 x) const {
    const __m512 product = _mm512_mul_ps(x, inverse_);
    __m512i nearest = _mm512_cvtps_epi32(product);
    const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(product, _mm512_cvtepi32_ps(nearest)));
    // "Not less" is also true of a NaN, from an inverse that overflows.
    if (_mm512_cmp_ps_mask(distance, _mm512_set1_ps(0.4999f), _CMP_NLT_UQ))
      nearest = _mm512_cvtps_epi32(_mm512_div_ps(x, scale_));
    const __m512i q = _mm512_add_epi32(nearest, zero_);
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()));
  }

 private:
  __m512 scale_, inverse_;
  __m512i zero_;
};

}  // namespace avx512
}  // namespace zs
