// Rows of x as tiles of 16, for the kernels whose lanes are rows of x.
#include "avx512_tokens.h"

#include <algorithm>

#include "avx512_quantize.h"

namespace zs {
namespace avx512 {

void prepare_byte_tile(const Call& c, int64_t tile) {
  const Weight& w = c.weight;
  const ByteTiles a(c);
  const int64_t first = tile * kTile;
  const int count = (int)std::min<int64_t>(kTile, c.m - first);
  RowScale rows[kTile];
  for (int j = 0; j < kTile; j++) {
    rows[j] = RowScale{0, 0};
    if (j < count) rows[j] = find_row_scale(c.x + (first + j) * w.columns, w.columns);
    a.scales[first + j] = rows[j].scale;
    a.zero_points[first + j] = rows[j].zero_point;
  }
  for (int64_t word = 0; word < w.words; word++) {
    alignas(64) uint8_t q[kTile][64] = {};
    const int64_t left = std::min<int64_t>(64, w.columns - word * 64);
    for (int j = 0; j < count; j++) {
      if (std::isnan(rows[j].scale)) continue;
      const Rounder round(rows[j]);
      const float* x = c.x + (first + j) * w.columns + word * 64;
      for (int64_t k = 0; k < left; k += 16) {
        const __mmask16 valid = first_lanes(left - k);
        const __m128i part = round(_mm512_maskz_loadu_ps(valid, x + k));
        _mm_store_si128((__m128i*)(q[j] + k), _mm_maskz_mov_epi8(valid, part));
      }
    }
    __m512i v[16];
    for (int j = 0; j < 16; j++) v[j] = _mm512_load_si512(q[j]);
    transpose(v);
    uint8_t* out = a.tiles + (tile * w.words + word) * kTileBytes;
    for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + j * 64, v[j]);
  }
}

void write_int8_tile(const Call& c, const Place& place, const int32_t* sums, const int32_t* kept) {
  const Weight& w = c.weight;
  const ByteTiles a(c);
  const int64_t token = place.token_tile * kTile, row = place.row;
  const __m512i zero_points = _mm512_loadu_si512(a.zero_points + token);
  __m512i v[16];
  for (int r = 0; r < 16; r++) {
    v[r] = _mm512_setzero_si512();
    if (r >= place.rows) continue;
    const __m512i sum = _mm512_loadu_si512(sums + r * kTile);
    const __m512i off = _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(kept[r]));
    const __m512 scale = _mm512_set1_ps(w.scales[(row + r) * w.blocks + place.block]);
    const __m512 part = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, off));
    v[r] = _mm512_castps_si512(_mm512_mul_ps(part, scale));
  }
  transpose(v);
  const __mmask16 valid = first_lanes(place.rows);
  const __m512 bias = c.bias ? _mm512_maskz_loadu_ps(valid, c.bias + row) : _mm512_setzero_ps();
  const int count = (int)std::min<int64_t>(kTile, c.m - token);
  for (int j = 0; j < count; j++) {
    float* y = c.y + (token + j) * w.rows + row;
    const __m512 before = place.first ? bias : _mm512_maskz_loadu_ps(valid, y);
    const __m512 scale = _mm512_set1_ps(a.scales[token + j]);
    _mm512_mask_storeu_ps(y, valid, _mm512_fmadd_ps(_mm512_castsi512_ps(v[j]), scale, before));
  }
}

}  // namespace avx512
}  // namespace zs
