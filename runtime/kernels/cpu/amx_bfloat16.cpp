// bfloat16 values with float32 x for many rows of x, with AMX.
//
// Each element of x is the sum of two bfloat16, so that what is lost of it, 2^-17, is far below
// what the weights lost when they were rounded to bfloat16, 2^-9. Sums are float32. Subnormal
// numbers count as zero. Zeros of W are multiplied, so that infinities and NaNs of x spread as in a
// dense product.
#include <algorithm>
#include <cstring>

#include "amx_tile.h"
#include "path.h"

namespace zs {
namespace {

constexpr int64_t kLeastTokens = 5;
constexpr int64_t kMostChunk = 128;   // rows of x in a chunk
constexpr int64_t kStripWords = 16;   // words of 32 rows of W that are expanded at once
constexpr int64_t kStripRows = 32;
constexpr int64_t kUnits = 2;         // tiles of 32 columns in a word
constexpr int64_t kUnitBytes = 2 * amx::kTileBytes;  // high and low parts of x for 32 columns

// The workspace: tiles of x, [token tile][unit][high, low][kTileBytes].
size_t workspace(const Weight& w, int64_t m) {
  return (size_t)(avx512::token_tiles(m) * w.words * kUnits * kUnitBytes);
}

int64_t prepare_tasks(const Weight&, int64_t m) { return avx512::token_tiles(m); }

// Rounds to nearest, in the upper half of each lane; the lower half is 0. A NaN stays one, and a
// finite number stays finite.
__m512i round_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), upper = _mm512_set1_epi32((int)0xffff0000);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __mmask16 overflow = _mm512_cmpeq_epi32_mask(_mm512_and_si512(up, exponent), exponent);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i nearest = _mm512_and_si512(up, upper);
  const __m512i safe = _mm512_mask_and_epi32(nearest, overflow, bits, upper);
  return _mm512_mask_mov_epi32(safe, nan, _mm512_set1_epi32(0x7fc00000));
}

// Writes two parts of 32 columns of a row of x, in 16 lanes of two bfloat16 each. `even` and `odd`
// hold its columns.
void split(__m512 even, __m512 odd, __m512i* high, __m512i* low) {
  const __m512i a = round_to_bfloat16(even), b = round_to_bfloat16(odd);
  *high = _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
  // Of an infinity or a NaN there is no rest: x - x is NaN.
  const auto rest = [](__m512 x, __m512i part) {
    const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(part));
    return round_to_bfloat16(
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, left, _CMP_ORD_Q), left));
  };
  *low = _mm512_or_si512(_mm512_srli_epi32(rest(even, a), 16), rest(odd, b));
}

void prepare(const Call& c, int64_t tile) {
  const Weight& w = c.weight;
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const int64_t first = tile * amx::kTile;
  const int count = (int)std::min<int64_t>(amx::kTile, c.m - first);
  char* out = c.workspace + tile * w.words * kUnits * kUnitBytes;
  for (int64_t unit = 0; unit < w.words * kUnits; unit++, out += kUnitBytes) {
    const int64_t left = w.columns - unit * 32;
    const __mmask16 valid[2] = {avx512::first_lanes(left), avx512::first_lanes(left - 16)};
    __m512i high[16], low[16];
    for (int j = 0; j < 16; j++) {
      high[j] = low[j] = _mm512_setzero_si512();
      if (j >= count || left <= 0) continue;
      const float* x = c.x + (first + j) * w.columns + unit * 32;
      const __m512 a = _mm512_maskz_loadu_ps(valid[0], x);
      const __m512 b = valid[1] ? _mm512_maskz_loadu_ps(valid[1], x + 16) : _mm512_setzero_ps();
      split(_mm512_permutex2var_ps(a, evens, b), _mm512_permutex2var_ps(a, odds, b), &high[j],
            &low[j]);
    }
    avx512::transpose(high);
    avx512::transpose(low);
    for (int j = 0; j < 16; j++) {
      _mm512_storeu_si512(out + j * 64, high[j]);
      _mm512_storeu_si512(out + amx::kTileBytes + j * 64, low[j]);
    }
  }
}

// 32 rows of W that a task works on.
struct Strip {
  alignas(64) uint16_t tiles[kStripWords * kUnits][2][amx::kTileBytes / 2];
  alignas(64) float sums[kMostChunk / amx::kTile][2][amx::kTile * amx::kTile];
  const uint16_t* values[kStripRows];  // what is to be expanded next
  int64_t first, count;                // rows of W
};

void begin_strip(const Weight& w, int64_t first, int64_t end, Strip& s) {
  s.first = first;
  s.count = std::min(end - first, kStripRows);
  for (int64_t r = 0; r < s.count; r++)
    s.values[r] = (const uint16_t*)w.values + w.row_offsets[first + r];
  // Rows of the tiles that no row of W fills stay zero.
  if (s.count < kStripRows) memset(s.tiles, 0, sizeof(s.tiles));
}

template <int Count>
void expand_rows(const Weight& w, int64_t word, int64_t words, int64_t row, Strip& s) {
  const uint64_t* bits[Count];
  const uint16_t* values[Count];
  int64_t ahead[Count];  // to the same place of the next strip
  for (int r = 0; r < Count; r++) {
    const int64_t n = s.first + row + r;
    bits[r] = w.bitmask + n * w.words + word;
    values[r] = s.values[row + r];
    ahead[r] = (w.row_offsets[std::min(n + kStripRows, w.rows)] - w.row_offsets[n]) * 2;
  }
  uint16_t* out = s.tiles[0][row / amx::kTile] + row % amx::kTile * 32;
  for (int64_t i = 0; i < words; i++)
    for (int r = 0; r < Count; r++)
      for (int half = 0; half < 2; half++) {
        const uint32_t mask = (uint32_t)(bits[r][i] >> 32 * half);
        const __m512i v =
            _mm512_maskz_expand_epi16((__mmask32)mask, _mm512_loadu_si512(values[r]));
        _mm_prefetch((const char*)values[r] + ahead[r], _MM_HINT_T1);
        values[r] += _mm_popcnt_u32(mask);
        _mm512_store_si512(out + (2 * i + half) * amx::kTileBytes + r * 32, v);
      }
  for (int r = 0; r < Count; r++) s.values[row + r] = values[r];
}

void expand(const Weight& w, int64_t word, int64_t words, Strip& s) {
  int64_t row = 0;
  for (; row + 4 <= s.count; row += 4) expand_rows<4>(w, word, words, row, s);
  for (; row < s.count; row++) expand_rows<1>(w, word, words, row, s);
  amx::stores_done();
}

// sums[token][row] += tiles (high + low), for `Rows` tiles of W and `Tokens` tiles of x.
template <int Rows, int Tokens>
void multiply(const uint16_t* tiles, const char* x, int64_t x_stride, int64_t units, bool first,
              float (*sums)[2][amx::kTile * amx::kTile]) {
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
  for (int64_t i = 0; i < units; i++) {
    const uint16_t* a = tiles + i * amx::kTileBytes;
    _tile_loadd(4, a, 64);
    if (Rows > 1) _tile_loadd(5, a + amx::kTileBytes / 2, 64);
    for (int part = 0; part < 2; part++) {
      const char* b = x + i * kUnitBytes + part * amx::kTileBytes;
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (Rows > 1) _tile_dpbf16ps(1, 5, 6);
      if (Tokens > 1) {
        _tile_loadd(7, b + x_stride, 64);
        _tile_dpbf16ps(2, 4, 7);
        if (Rows > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums[0][0], 64);
  if (Rows > 1) _tile_stored(1, sums[0][1], 64);
  if (Tokens > 1) _tile_stored(2, sums[1][0], 64);
  if (Rows > 1 && Tokens > 1) _tile_stored(3, sums[1][1], 64);
}

template <int Rows>
void multiply_chunk(const Call& c, int64_t tile, int64_t end, int64_t word, int64_t words,
                    Strip& s) {
  const int64_t stride = c.weight.words * kUnits * kUnitBytes, units = words * kUnits;
  const char* x = c.workspace + tile * stride + word * kUnits * kUnitBytes;
  const uint16_t* tiles = s.tiles[0][0];
  int64_t t = 0;
  for (; tile + t + 2 <= end; t += 2)
    multiply<Rows, 2>(tiles, x + t * stride, stride, units, word == 0, s.sums + t);
  if (tile + t < end)
    multiply<Rows, 1>(tiles, x + t * stride, stride, units, word == 0, s.sums + t);
}

// y of one tile of W and one of x.
void write_tile(const Call& c, int64_t token_tile, int half, const float* sums, const Strip& s) {
  const int64_t token = token_tile * amx::kTile, row = s.first + half * amx::kTile;
  const int64_t rows = c.weight.rows;
  __m512i v[16];
  for (int r = 0; r < 16; r++) v[r] = _mm512_load_si512(sums + r * amx::kTile);
  avx512::transpose(v);
  const __mmask16 valid = avx512::first_lanes(s.count - half * amx::kTile);
  const __m512 bias = c.bias ? _mm512_maskz_loadu_ps(valid, c.bias + row) : _mm512_setzero_ps();
  const int count = (int)std::min<int64_t>(amx::kTile, c.m - token);
  for (int j = 0; j < count; j++)
    _mm512_mask_storeu_ps(c.y + (token + j) * rows + row, valid,
                          _mm512_add_ps(_mm512_castsi512_ps(v[j]), bias));
}

void run_strip(const Call& c, int64_t tile, int64_t tile_end, Strip& s) {
  const Weight& w = c.weight;
  const bool both = s.count > amx::kTile;
  int64_t word = 0;
  do {  // once even without columns: y is the bias then
    const int64_t words = std::min(w.words - word, kStripWords);
    expand(w, word, words, s);
    if (both)
      multiply_chunk<2>(c, tile, tile_end, word, words, s);
    else
      multiply_chunk<1>(c, tile, tile_end, word, words, s);
    word += words;
  } while (word < w.words);
  for (int64_t t = tile; t < tile_end; t++)
    for (int half = 0; half < (both ? 2 : 1); half++)
      write_tile(c, t, half, s.sums[t - tile][half], s);
}

int64_t chunk_tiles(const Weight& w) {
  return avx512::chunk_tokens(w.words * 256, kMostChunk) / amx::kTile;
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const int64_t tiles = avx512::token_tiles(c.m), chunk = chunk_tiles(c.weight);
  const amx::TileScope scope;
  Strip strip;
  for (int64_t tile = 0; tile < tiles; tile += chunk)
    for (int64_t n = begin; n < end; n += kStripRows) {
      begin_strip(c.weight, n, end, strip);
      run_strip(c, tile, std::min(tiles, tile + chunk), strip);
    }
}

bool serves(const Weight& w, int64_t m, int32_t) {
  return w.type == ZS_BFLOAT16 && m >= kLeastTokens;
}

double cost(const Weight& w, int64_t m) {
  const double words = (double)w.rows * (double)w.words;
  const double tiles = (double)avx512::token_tiles(m);
  const double chunks = (double)((avx512::token_tiles(m) + chunk_tiles(w) - 1) / chunk_tiles(w));
  // Fitted to a Xeon, beside the cost of avx512-throughput: 16 and 128 tokens, 0.1 to 0.5 kept.
  return words * ((2 + 13 * w.density) * chunks + 12 * tiles) + 10 * (double)w.rows * tiles +
         3 * (double)(m * w.columns);
}

int64_t row_step(const Weight& w, int64_t m) {
  return avx512::token_tiles(m) > chunk_tiles(w) ? 4 * kStripRows : kStripRows;
}

}  // namespace

extern const Path amx_bfloat16 = {"amx-bfloat16", kAmx,      0,             false,   serves,   cost,
                                  nullptr,        workspace, prepare_tasks, prepare, row_step,
                                  rows};

}  // namespace zs
