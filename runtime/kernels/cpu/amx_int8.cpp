// int8 values with 8-bit activations for many rows of x, with AMX: W is expanded tile by tile into
// the cache, and each expansion serves a chunk of rows of x.
#include <algorithm>
#include <cstring>

#include "amx_tile.h"
#include "path.h"

namespace zs {
namespace {

using avx512::ByteTiles;

constexpr int64_t kLeastTokens = 5;
constexpr int64_t kMostChunk = 256;   // rows of x in a chunk
constexpr int64_t kStripWords = 24;   // words of 32 rows of W that are expanded at once
constexpr int64_t kStripRows = 32;
constexpr int64_t kExactWords = 512;  // 255 * 128 * 64 * 512 < 2^31: sums of 32 bits are exact

size_t workspace(const Weight& w, int64_t m) { return ByteTiles::bytes(w, m); }

int64_t prepare_tasks(const Weight&, int64_t m) { return avx512::token_tiles(m); }

// 32 rows of W that a task works on.
struct Strip {
  alignas(64) int8_t tiles[kStripWords][2][amx::kTileBytes];
  alignas(64) int32_t sums[kMostChunk / amx::kTile][2][amx::kTile * amx::kTile];
  int32_t kept[kStripRows];            // sums of the kept values in the current segment
  const int8_t* values[kStripRows];    // what is to be expanded next
  int64_t first, count;                // rows of W
};

void begin_strip(const Weight& w, int64_t first, int64_t end, Strip& s) {
  s.first = first;
  s.count = std::min(end - first, kStripRows);
  for (int64_t r = 0; r < s.count; r++)
    s.values[r] = (const int8_t*)w.values + w.row_offsets[first + r];
  // Rows of the tiles that no row of W fills stay zero.
  if (s.count < kStripRows) memset(s.tiles, 0, sizeof(s.tiles));
}

template <int Count>
void expand_rows(const Weight& w, int64_t word, int64_t words, int64_t row, Strip& s) {
  const __m512i ones = _mm512_set1_epi8(1);
  const uint64_t* bits[Count];
  const int8_t* values[Count];
  __m512i kept[Count];
  int64_t ahead[Count];  // to the same place of the next strip
  for (int r = 0; r < Count; r++) {
    const int64_t n = s.first + row + r;
    bits[r] = w.bitmask + n * w.words + word;
    values[r] = s.values[row + r];
    ahead[r] = w.row_offsets[std::min(n + kStripRows, w.rows)] - w.row_offsets[n];
    kept[r] = _mm512_setzero_si512();
  }
  int8_t* out = s.tiles[0][row / amx::kTile] + row % amx::kTile * 64;
  for (int64_t i = 0; i < words; i++, out += 2 * amx::kTileBytes)
    for (int r = 0; r < Count; r++) {
      const uint64_t mask = bits[r][i];
      const __m512i v = _mm512_maskz_expand_epi8((__mmask64)mask, _mm512_loadu_si512(values[r]));
      _mm_prefetch((const char*)values[r] + ahead[r], _MM_HINT_T1);
      values[r] += _mm_popcnt_u64(mask);
      kept[r] = _mm512_dpbusd_epi32(kept[r], ones, v);
      _mm512_store_si512(out + r * 64, v);
    }
  for (int r = 0; r < Count; r++) {
    s.values[row + r] = values[r];
    s.kept[row + r] += _mm512_reduce_add_epi32(kept[r]);
  }
}

void expand(const Weight& w, int64_t word, int64_t words, Strip& s) {
  int64_t row = 0;
  for (; row + 4 <= s.count; row += 4) expand_rows<4>(w, word, words, row, s);
  for (; row < s.count; row++) expand_rows<1>(w, word, words, row, s);
  amx::stores_done();
}

// sums[token][row] += tiles x, for `Rows` tiles of W and `Tokens` tiles of x.
template <int Rows, int Tokens>
void multiply(const int8_t* tiles, const uint8_t* x, int64_t x_stride, int64_t words, bool first,
              int32_t (*sums)[2][amx::kTile * amx::kTile]) {
  if (first) {
    _tile_zero(0);
    if (Rows > 1) _tile_zero(1);
    if (Tokens > 1) _tile_zero(2);
    if (Rows > 1 && Tokens > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0][0], 64);
    if (Rows > 1) _tile_loadd(1, sums[0][1], 64);
    if (Tokens > 1) _tile_loadd(2, sums[1][0], 64);
    if (Rows > 1 && Tokens > 1) _tile_loadd(3, sums[1][1], 64);
  }
  for (int64_t i = 0; i < words; i++) {
    const int8_t* a = tiles + i * 2 * amx::kTileBytes;
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
  if (Rows > 1) _tile_stored(1, sums[0][1], 64);
  if (Tokens > 1) _tile_stored(2, sums[1][0], 64);
  if (Rows > 1 && Tokens > 1) _tile_stored(3, sums[1][1], 64);
}

template <int Rows>
void multiply_chunk(const Weight& w, const ByteTiles& a, int64_t tile, int64_t end, int64_t word,
                    int64_t words, bool first, Strip& s) {
  const int64_t stride = w.words * amx::kTileBytes;
  const uint8_t* x = a.tiles + tile * stride + word * amx::kTileBytes;
  const int8_t* tiles = s.tiles[0][0];
  int64_t t = 0;
  for (; tile + t + 2 <= end; t += 2)
    multiply<Rows, 2>(tiles, x + t * stride, stride, words, first, s.sums + t);
  if (tile + t < end) multiply<Rows, 1>(tiles, x + t * stride, stride, words, first, s.sums + t);
}

void run_strip(const Call& c, const ByteTiles& a, int64_t tile, int64_t tile_end, Strip& s) {
  const Weight& w = c.weight;
  const bool both = s.count > amx::kTile;
  bool first_segment = true;
  for (int64_t block = 0; block < w.blocks; block++) {
    const int64_t last = std::min(w.words, (block + 1) * w.block_words);
    int64_t word = block * w.block_words;
    do {  // once even without columns: y is the bias then
      const int64_t begin = word, stop = std::min(last, word + kExactWords);
      memset(s.kept, 0, sizeof(s.kept));
      do {
        const int64_t words = std::min(stop - word, kStripWords);
        expand(w, word, words, s);
        if (both)
          multiply_chunk<2>(w, a, tile, tile_end, word, words, word == begin, s);
        else
          multiply_chunk<1>(w, a, tile, tile_end, word, words, word == begin, s);
        word += words;
      } while (word < stop);
      for (int64_t t = tile; t < tile_end; t++)
        for (int half = 0; half < (both ? 2 : 1); half++) {
          const int64_t done = half * amx::kTile;
          const int64_t rows = std::min<int64_t>(amx::kTile, s.count - done);
          const avx512::Place place = {s.first + done, rows, block, t, first_segment};
          avx512::write_int8_tile(c, place, s.sums[t - tile][half], s.kept + done);
        }
      first_segment = false;
    } while (word < last);
  }
}

int64_t chunk_tiles(const Weight& w) {
  return avx512::chunk_tokens(w.words * 64, kMostChunk) / amx::kTile;
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const ByteTiles a(c);
  const int64_t tiles = avx512::token_tiles(c.m), chunk = chunk_tiles(c.weight);
  const amx::TileScope scope;
  Strip strip;
  for (int64_t tile = 0; tile < tiles; tile += chunk)
    for (int64_t n = begin; n < end; n += kStripRows) {
      begin_strip(c.weight, n, end, strip);
      run_strip(c, a, tile, std::min(tiles, tile + chunk), strip);
    }
}

bool serves(const Weight& w, int64_t m, int32_t level) {
  return w.type == ZS_INT8 && level == 4 && m >= kLeastTokens;
}

double cost(const Weight& w, int64_t m) {
  const double words = (double)w.rows * (double)w.words;
  const double tiles = (double)avx512::token_tiles(m);
  const double chunks = (double)((avx512::token_tiles(m) + chunk_tiles(w) - 1) / chunk_tiles(w));
  const double out = (double)w.rows * (double)w.blocks * tiles;
  // Fitted to a Xeon: the expansion and its memory traffic, then products.
  return words * ((7 + 10 * w.density) * chunks + 10 * tiles) + 15 * out +
         2 * (double)(m * w.columns);
}

int64_t row_step(const Weight& w, int64_t m) {
  return avx512::token_tiles(m) > chunk_tiles(w) ? 4 * kStripRows : kStripRows;
}

}  // namespace

extern const Path amx_int8 = {"amx-int8",    kAmx,
                              0,             false,
                              serves,        cost,
                              nullptr,       workspace,
                              prepare_tasks, avx512::prepare_byte_tile,
                              row_step,      rows};

}  // namespace zs
