// int8 values with 8-bit activations for many rows of x, with VNNI: lanes are rows of x.
#include <algorithm>
#include <cstring>

#include "avx512_int8_strip.h"

namespace zs {
namespace {

using avx512::ByteTiles;
using avx512::Int8Product;
using avx512::Int8Strip;
using avx512::kStripRows;
using avx512::kTileBytes;

constexpr int64_t kSlabWords = 4;  // words whose x stays in the L1 cache: 16 KiB
constexpr int64_t kRunTiles = 4;   // tiles of x that are multiplied together
constexpr int64_t kGroups = 16;    // groups of four columns in a word

// sums += bytes x for `Rows` rows of W and `Tiles` tiles of x. `sums` and `bytes` are those of the
// first row.
template <int Rows, int Tiles>
void multiply_rows(const int8_t* bytes, const uint8_t* x, int64_t x_stride, int64_t words,
                   bool first, int32_t* sums) {
  constexpr int64_t kSums = kStripRows * avx512::kTile;  // from one tile of x to the next
  __m512i sum[Rows][Tiles];
  ZS_UNROLL
  for (int r = 0; r < Rows; r++) {
    ZS_UNROLL
    for (int t = 0; t < Tiles; t++)
      sum[r][t] = first ? _mm512_setzero_si512()
                        : _mm512_load_si512(sums + t * kSums + r * avx512::kTile);
  }
  for (int64_t i = 0; i < words; i++, bytes += kStripRows * 64)
    for (int64_t g = 0; g < kGroups; g++, x += 64) {
      __m512i columns[Tiles];
      ZS_UNROLL
      for (int t = 0; t < Tiles; t++) columns[t] = _mm512_load_si512(x + t * x_stride);
      ZS_UNROLL
      for (int r = 0; r < Rows; r++) {
        int32_t four;
        memcpy(&four, bytes + r * 64 + g * 4, sizeof(four));
        const __m512i v = _mm512_set1_epi32(four);
        ZS_UNROLL
        for (int t = 0; t < Tiles; t++) avx512::add_products(sum[r][t], columns[t], v);
      }
    }
  ZS_UNROLL
  for (int r = 0; r < Rows; r++) {
    ZS_UNROLL
    for (int t = 0; t < Tiles; t++)
      _mm512_store_si512(sums + t * kSums + r * avx512::kTile, sum[r][t]);
  }
}

// One slab of the words of a strip, from `slab` on, for all its rows.
template <int Tiles>
void multiply_slab(const ByteTiles& a, int64_t x_stride, const Int8Product& p, int64_t tile,
                   int64_t slab, Int8Strip& s) {
  constexpr int kRows = Tiles == 1 ? 16 : Tiles <= 3 ? 8 : 4;
  const uint8_t* x = a.tiles + tile * x_stride + (p.word + slab) * kTileBytes;
  const int64_t words = std::min(p.words - slab, kSlabWords);
  const bool first = p.first && slab == 0;
  for (int64_t row = 0; row < s.count; row += kRows)
    multiply_rows<kRows, Tiles>(s.bytes[slab][row], x, x_stride, words, first,
                                s.sums[tile - p.tile][row]);
}

void multiply(const Weight& w, const ByteTiles& x, Int8Strip& s, const Int8Product& p) {
  const int64_t stride = w.words * kTileBytes;
  for (int64_t tile = p.tile; tile < p.end; tile += kRunTiles) {
    int64_t slab = 0;
    do {  // once even without columns: the sums are set to zero
      switch (std::min(kRunTiles, p.end - tile)) {
        case 1: multiply_slab<1>(x, stride, p, tile, slab, s); break;
        case 2: multiply_slab<2>(x, stride, p, tile, slab, s); break;
        case 3: multiply_slab<3>(x, stride, p, tile, slab, s); break;
        default: multiply_slab<4>(x, stride, p, tile, slab, s); break;
      }
      slab += kSlabWords;
    } while (slab < p.words);
  }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  avx512::multiply_strips(c, begin, end, multiply);
}

double cost(const Weight& w, int64_t m) {
  return avx512::strips_cost(w, m, 7 + 10 * w.density, 10);
}

}  // namespace

extern const Path avx512_int8_tile = {"avx512-int8-tile",
                                      kAvx512 | kAvx512Vnni,
                                      0,
                                      false,
                                      avx512::strips_serve,
                                      cost,
                                      nullptr,
                                      avx512::strips_workspace,
                                      avx512::strips_prepare_tasks,
                                      avx512::prepare_byte_tile,
                                      avx512::strips_row_step,
                                      rows};

}  // namespace zs
