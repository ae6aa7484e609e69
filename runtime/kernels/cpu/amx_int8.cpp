// int8 values with 8-bit activations for many rows of x, with AMX.
#include "amx_tile.h"
#include "avx512_int8_strip.h"
#include "path.h"

namespace zs {
namespace {

using amx::kTile;
using avx512::ByteTiles;
using avx512::Int8Product;
using avx512::Int8Strip;
using avx512::kStripRows;

using Sums = int32_t[kStripRows][kTile];  // of one tile of x

// sums += bytes x, for `Rows` tiles of W and `Tokens` tiles of x.
template <int Rows, int Tokens>
void multiply(const int8_t* bytes, const uint8_t* x, int64_t x_stride, int64_t words, bool first,
              Sums* sums) {
  if (first) {
    _tile_zero(0);
    if (Rows > 1) _tile_zero(1);
    if (Tokens > 1) _tile_zero(2);
    if (Rows > 1 && Tokens > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0][0], 64);
    if (Rows > 1) _tile_loadd(1, sums[0][kTile], 64);
    if (Tokens > 1) _tile_loadd(2, sums[1][0], 64);
    if (Rows > 1 && Tokens > 1) _tile_loadd(3, sums[1][kTile], 64);
  }
  for (int64_t i = 0; i < words; i++) {
    const int8_t* a = bytes + i * kStripRows * 64;
    const uint8_t* b = x + i * amx::kTileBytes;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbsud(0, 4, 6);
    if (Rows > 1) {
      _tile_loadd(5, a + amx::kTileBytes, 64);
      _tile_dpbsud(1, 5, 6);
    }
    if (Tokens > 1) {
      _tile_loadd(7, b + x_stride, 64);
      _tile_dpbsud(2, 4, 7);
      if (Rows > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], 64);
  if (Rows > 1) _tile_stored(1, sums[0][kTile], 64);
  if (Tokens > 1) _tile_stored(2, sums[1][0], 64);
  if (Rows > 1 && Tokens > 1) _tile_stored(3, sums[1][kTile], 64);
}

template <int Rows>
void multiply_rows(const Weight& w, const ByteTiles& a, Int8Strip& s, const Int8Product& p) {
  const int64_t stride = w.words * amx::kTileBytes, tiles = p.end - p.tile;
  const uint8_t* x = a.tiles + p.tile * stride + p.word * amx::kTileBytes;
  const int8_t* bytes = s.bytes[0][0];
  int64_t t = 0;
  for (; t + 2 <= tiles; t += 2)
    multiply<Rows, 2>(bytes, x + t * stride, stride, p.words, p.first, s.sums + t);
  if (t < tiles)
    multiply<Rows, 1>(bytes, x + t * stride, stride, p.words, p.first, s.sums + t);
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const amx::TileScope scope;
  avx512::multiply_strips(
      c, begin, end,
      [](const Weight& w, const ByteTiles& x, Int8Strip& s, const Int8Product& p) {
        amx::stores_done();
        if (s.count > kTile)
          multiply_rows<2>(w, x, s, p);
        else
          multiply_rows<1>(w, x, s, p);
      });
}

double cost(const Weight& w, int64_t m) {
  return avx512::strips_cost(w, m, 7 + 10 * w.density, 5);
}

}  // namespace

extern const Path amx_int8 = {"amx-int8",
                              kAmx,
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
