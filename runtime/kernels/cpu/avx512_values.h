// Kept values under their bitmask, expanded to float32 in registers, and x laid out to match.
//
// Only files that are compiled for AVX-512 (F, BW, DQ, VL, VBMI2) may include this.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "path.h"

namespace zs {
namespace avx512 {

// Calls body(std::integral_constant<int, i>) for i = 0 .. count - 1, unrolled by any compiler, so
// that arrays of registers that are indexed by i really live in registers.
template <class Body, int... i>
inline void unroll_each(std::integer_sequence<int, i...>, Body& body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int count, class Body>
inline void unroll(Body&& body) {
  unroll_each(std::make_integer_sequence<int, count>(), body);
}

inline int64_t count_bits(uint64_t word) { return (int64_t)_mm_popcnt_u64(word); }

// The first `count` (0 and less to 16 and more) of 16 lanes.
inline __mmask16 first_lanes(int64_t count) {
  if (count <= 0) return 0;
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

// The order in which 64 columns lie in four registers, lane j of register q:
enum class LaneOrder {
  kNatural,   // column 16 q + j
  kEvenOdd,   // column 32 (q / 2) + 2 j + q % 2
  kQuarters,  // column 4 j + q
};

// How many of the first `columns` of a word are kept. Of an even weight (`Weight::even`) that is
// known without counting, so that the loads of its values wait for nothing.
template <bool even, int columns>
inline int64_t kept_before(uint64_t word) {
  if (even) return columns / 2;
  return count_bits(columns == 64 ? word : word & (((uint64_t)1 << columns % 64) - 1));
}

// Each kind of values is a class with
//   Element            what is stored
//   kOrder             the order that `expand` leaves the columns in
//   kRowScale          whether each sum of a row is to be multiplied by the one scale of the row
//   expand<even>(p, word, scale, v)  the 64 columns of a word of bitmask, whose kept values begin
//     at p. It reads at most 64 elements from p: never beyond the padding of the values.
struct Float32Values {
  using Element = float;
  static constexpr LaneOrder kOrder = LaneOrder::kNatural;
  static constexpr bool kRowScale = false;

  template <bool even>
  static void expand(const float* p, uint64_t word, float, __m512 (&v)[4]) {
    v[0] = _mm512_maskz_expand_ps((__mmask16)word, _mm512_loadu_ps(p));
    v[1] = _mm512_maskz_expand_ps((__mmask16)(word >> 16),
                                  _mm512_loadu_ps(p + kept_before<even, 16>(word)));
    v[2] = _mm512_maskz_expand_ps((__mmask16)(word >> 32),
                                  _mm512_loadu_ps(p + kept_before<even, 32>(word)));
    v[3] = _mm512_maskz_expand_ps((__mmask16)(word >> 48),
                                  _mm512_loadu_ps(p + kept_before<even, 48>(word)));
  }
};

struct Float16Values {
  using Element = uint16_t;
  static constexpr LaneOrder kOrder = LaneOrder::kNatural;
  static constexpr bool kRowScale = false;

  static __m512 load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }

  // Converted before it is expanded: a conversion from memory leaves the shuffle port free.
  template <bool even>
  static void expand(const uint16_t* p, uint64_t word, float, __m512 (&v)[4]) {
    v[0] = _mm512_maskz_expand_ps((__mmask16)word, load(p));
    v[1] = _mm512_maskz_expand_ps((__mmask16)(word >> 16), load(p + kept_before<even, 16>(word)));
    v[2] = _mm512_maskz_expand_ps((__mmask16)(word >> 32), load(p + kept_before<even, 32>(word)));
    v[3] = _mm512_maskz_expand_ps((__mmask16)(word >> 48),
                                  load(p + kept_before<even, 48>(word)));
  }
};

struct Bfloat16Values {
  using Element = uint16_t;
  static constexpr LaneOrder kOrder = LaneOrder::kEvenOdd;
  static constexpr bool kRowScale = false;

  // One expansion serves 32 columns; a bfloat16 is the upper half of a float32.
  template <bool even>
  static void expand(const uint16_t* p, uint64_t word, float, __m512 (&v)[4]) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    const uint32_t low = (uint32_t)word, high = (uint32_t)(word >> 32);
    const __m512i a = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(p));
    const __m512i b = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(p + kept_before<even, 32>(word)));
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    v[2] = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    v[3] = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
  }
};

// With one scale a row.
struct Int8Values {
  using Element = int8_t;
  static constexpr LaneOrder kOrder = LaneOrder::kQuarters;
  static constexpr bool kRowScale = true;

  // One expansion serves all 64 columns; shifts then bring each byte down with its sign.
  template <bool even>
  static void expand(const int8_t* p, uint64_t word, float, __m512 (&v)[4]) {
    const __m512i a = _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(p));
    v[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24));
    v[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 16), 24));
    v[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 8), 24));
    v[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(a, 24));
  }
};

// With a scale for each block of columns.
struct Int8BlockValues : Int8Values {
  static constexpr bool kRowScale = false;

  template <bool even>
  static void expand(const int8_t* p, uint64_t word, float scale, __m512 (&v)[4]) {
    Int8Values::expand<even>(p, word, scale, v);
    unroll<4>([&](auto q) { v[q] = _mm512_mul_ps(v[q], _mm512_set1_ps(scale)); });
  }
};

// Calls body(Values()) with the kind of values that a weight has.
template <class Body>
inline auto with_values(const Weight& w, Body&& body) {
  switch (w.type) {
    case ZS_FLOAT16: return body(Float16Values());
    case ZS_BFLOAT16: return body(Bfloat16Values());
    case ZS_INT8: return w.blocks == 1 ? body(Int8Values()) : body(Int8BlockValues());
    default: return body(Float32Values());
  }
}

// The even and the odd lanes of 32.
inline void split_pairs(__m512 a, __m512 b, __m512* even, __m512* odd) {
  const __m512i first =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(a, first, b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b);
}

// Writes 64 columns of x to `out` (aligned to 64) in an order; those beyond `count` are 0.
template <LaneOrder order>
inline void arrange_columns(const float* x, int64_t count, float* out) {
  __m512 v[4];
  unroll<4>([&](auto q) {
    const __mmask16 valid = first_lanes(count - 16 * q);
    // A mask of 0 must not even form an address beyond x.
    v[q] = valid ? _mm512_maskz_loadu_ps(valid, x + 16 * q) : _mm512_setzero_ps();
  });
  if (order != LaneOrder::kNatural) {
    __m512 even[2], odd[2];
    split_pairs(v[0], v[1], &even[0], &odd[0]);
    split_pairs(v[2], v[3], &even[1], &odd[1]);
    if (order == LaneOrder::kEvenOdd) {
      v[0] = even[0], v[1] = odd[0], v[2] = even[1], v[3] = odd[1];
    } else {
      split_pairs(even[0], even[1], &v[0], &v[2]);
      split_pairs(odd[0], odd[1], &v[1], &v[3]);
    }
  }
  unroll<4>([&](auto q) { _mm512_store_ps(out + 16 * q, v[q]); });
}

// Lane i of the result is the sum of the lanes of v[i].
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  // Each quarter of a register is now (a, b, a, b) or (c, d, c, d): join them to (a, b, c, d).
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The bytes that a weight is read from: values, bitmask and scales.
inline double stored_bytes(const Weight& w) {
  const double kept = (double)w.row_offsets[w.rows], words = (double)(w.rows * w.words);
  const double scales = w.scales ? (double)(w.rows * w.blocks) * sizeof(float) : 0;
  return kept * (double)value_bytes(w.type) + words * sizeof(uint64_t) + scales;
}

// Of memory that is not in cache, per cycle; see the costs of the kernels.
constexpr double kBytesPerCycle = 4;

// Software prefetches for a word of bitmask: the lines of memory that its values take on average.
inline int lines_per_word(const Weight& w) {
  const double lines = w.density * (double)value_bytes(w.type);  // 64 columns, 64 bytes a line
  return lines <= 1.03 ? 1 : lines <= 2.06 ? 2 : lines <= 3.1 ? 3 : 4;
}

inline void prefetch_lines(uintptr_t address, int lines) {
  for (int i = 0; i < lines; i++)
    _mm_prefetch((const char*)(address + 64 * (uintptr_t)i), _MM_HINT_T0);
}

}  // namespace avx512
}  // namespace zs
