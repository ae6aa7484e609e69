// Rows of x as tiles of 16, for the kernels whose lanes are rows of x.
//
// Only files that are compiled for AVX-512 may include this.
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
namespace avx512 {

constexpr int kTile = 16;             // rows of x in a tile
constexpr int64_t kTileBytes = 1024;  // 64 bytes of each

inline int64_t token_tiles(int64_t m) { return (m + kTile - 1) / kTile; }

// Turns a 16 x 16 matrix of 32-bit elements round.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // In each 128 bits, v[4 g + c] now gets column c of rows 4 g .. 4 g + 3.
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    const __m512i low01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

// The first `count` (0 and less to 16 and more) of 16 lanes.
inline __mmask16 first_lanes(int64_t count) {
  if (count <= 0) return 0;
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

// Adds to each lane of `sum` the products of its four bytes of x with those of w.
//
// GCC copies the sum of the intrinsic from register to register, and runs out of them.
inline void add_products(__m512i& sum, __m512i x, __m512i w) {
#if defined(__GNUC__) && !defined(__clang__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#else
  sum = _mm512_dpbusd_epi32(sum, x, w);
#endif
}

// How many rows of x are multiplied with each expansion of W: as many as stay in the L2 cache.
inline int64_t chunk_tokens(int64_t bytes_per_token, int64_t most) {
  constexpr int64_t kCache = 1280 * 1024;
  const int64_t tokens = kCache / (bytes_per_token + 1) / 32 * 32;
  return tokens < 64 ? 64 : tokens > most ? most : tokens;
}

// The workspace of the int8 kernels: rows of x in 8 bits, rounded up to whole tiles. In a tile, the
// four bytes of columns 4 g .. 4 g + 3 of row j lie at [g][j].
struct ByteTiles {
  float* scales;
  int32_t* zero_points;
  uint8_t* tiles;  // [token tile][word][kTileBytes]

  explicit ByteTiles(const Call& c) {
    const int64_t padded = token_tiles(c.m) * kTile;
    scales = (float*)c.workspace;
    zero_points = (int32_t*)(scales + padded);
    tiles = (uint8_t*)(zero_points + padded);
  }

  static size_t bytes(const Weight& w, int64_t m) {
    return (size_t)(token_tiles(m) * (kTile * 8 + w.words * kTileBytes));
  }
};

// Fills one token tile of ByteTiles; for Path::prepare.
void prepare_byte_tile(const Call& c, int64_t tile);

// Where the sums of a tile of products belong: 16 rows of W from `row`, of which `rows` exist, and
// one block of their scales.
struct Place {
  int64_t row, rows, block;
  int64_t token_tile;
  bool first;  // y = bias + product; otherwise y += product
};

// Writes scale (sum - zero point * kept) to y. `sums` is [16 rows of W][16 rows of x]; `kept` has
// the sums of the kept values of each row of W.
void write_int8_tile(const Call& c, const Place& place, const int32_t* sums, const int32_t* kept);

}  // namespace avx512
}  // namespace zs
