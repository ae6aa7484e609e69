// Values to their lanes, for the AVX2 kernels.
//
// Only files that are compiled for AVX2 may include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "path.h"

// Before a loop over registers: unless it is unrolled early, GCC keeps them in memory.
#if defined(__GNUC__) && !defined(__clang__)
#define ZS_UNROLL _Pragma("GCC unroll 32")
#else
#define ZS_UNROLL
#endif

namespace zs {
namespace avx2 {
namespace {

// For each byte of a bitmask: which of the next 8 values goes to each lane. A set sign bit makes a
// zero.
struct FloatLanes {
  alignas(64) uint32_t of[256][8];
};
struct HalfLanes {  // two bytes of a shuffle for each value
  alignas(64) uint8_t of[256][16];
};
struct ByteLanes {
  alignas(64) uint8_t of[256][8];
};

constexpr FloatLanes make_float_lanes() {
  FloatLanes table = {};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t next = 0;
    for (int lane = 0; lane < 8; lane++)
      table.of[byte][lane] = byte >> lane & 1 ? next++ : 0x80000000u;
  }
  return table;
}

constexpr HalfLanes make_half_lanes() {
  HalfLanes table = {};
  for (int byte = 0; byte < 256; byte++) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; lane++) {
      const bool kept = byte >> lane & 1;
      table.of[byte][2 * lane] = kept ? (uint8_t)(2 * next) : (uint8_t)0x80;
      table.of[byte][2 * lane + 1] = kept ? (uint8_t)(2 * next + 1) : (uint8_t)0x80;
      next = (uint8_t)(next + kept);
    }
  }
  return table;
}

constexpr ByteLanes make_byte_lanes() {
  ByteLanes table = {};
  for (int byte = 0; byte < 256; byte++) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; lane++)
      table.of[byte][lane] = byte >> lane & 1 ? next++ : (uint8_t)0x80;
  }
  return table;
}

// A byte goes to the upper half of 16 bits, which are 256 times its value then.
constexpr HalfLanes make_high_lanes() {
  HalfLanes table = {};
  for (int byte = 0; byte < 256; byte++) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; lane++) {
      table.of[byte][2 * lane] = 0x80;
      table.of[byte][2 * lane + 1] = byte >> lane & 1 ? next++ : (uint8_t)0x80;
    }
  }
  return table;
}

constexpr FloatLanes kFloatLanes = make_float_lanes();
constexpr HalfLanes kHalfLanes = make_half_lanes();
constexpr HalfLanes kHighLanes = make_high_lanes();
constexpr ByteLanes kByteLanes = make_byte_lanes();

// The next floats where a bit is set, zero elsewhere.
inline __m256 expand8(__m256 values, uint32_t bits) {
  const __m256i lanes = _mm256_load_si256((const __m256i*)kFloatLanes.of[bits]);
  const __m256 moved = _mm256_permutevar8x32_ps(values, lanes);
  return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

// The same of 16-bit values.
inline __m128i expand8(__m128i values, uint32_t bits) {
  return _mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)kHalfLanes.of[bits]));
}

// 16 columns of 16-bit values: those of the second 8 begin at `high`.
inline __m256i expand16(const uint16_t* low, const uint16_t* high, uint32_t first,
                        uint32_t second) {
  const __m256i values = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
      _mm_loadu_si128((const __m128i*)high), 1);
  const __m256i lanes = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_load_si128((const __m128i*)kHalfLanes.of[first])),
      _mm_load_si128((const __m128i*)kHalfLanes.of[second]), 1);
  return _mm256_shuffle_epi8(values, lanes);
}

// What one core reads from memory.
constexpr double kBytesPerCycle = 3.5;

inline double elements(const Weight& w) { return (double)w.rows * (double)w.columns; }

inline double stored_bytes(const Weight& w) {
  return (double)(w.rows * w.words) * 8 +
         (double)w.row_offsets[w.rows] * (double)value_bytes(w.type);
}

inline float sum_lanes(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace
}  // namespace avx2
}  // namespace zs
