// int8 values with 8-bit activations for many rows of x, with VNNI: lanes are rows of x.
//
// W is expanded strip by strip into the cache and each expansion serves a chunk of rows of x, in
// one of two ways: "tile" multiplies all of it from registers; "skip" lists the groups of four
// columns in which a row keeps something, and leaves the others out. At 90 % sparsity a third of
// the groups is left.
#include <algorithm>
#include <cstring>

#include "avx512_tokens.h"
#include "path.h"

namespace zs {
namespace {

using avx512::ByteTiles;
using avx512::kTile;
using avx512::kTileBytes;

constexpr int64_t kLeastTokens = 5;
constexpr int64_t kStripRows = 16;
constexpr int64_t kStripWords = 16;   // words of the rows that are expanded at once
constexpr int64_t kSlabWords = 4;     // words whose x stays in the L1 cache: 16 KiB
constexpr int64_t kMostChunk = 256;   // rows of x in a chunk
constexpr int64_t kRunTiles = 4;      // tiles of x that are multiplied together
constexpr int64_t kExactWords = 512;  // 255 * 128 * 64 * 512 < 2^31: sums of 32 bits are exact
constexpr int64_t kGroups = 16;       // groups of four columns in a word

// One row of the strip. Groups are listed in order; the list of each slab has an even length.
struct Groups {
  uint16_t index[kStripWords * kGroups + 32];  // the group within the strip
  int32_t bytes[kStripWords * kGroups + 32];
  int32_t slab[kStripWords / kSlabWords + 1];  // where the list of each slab begins
};

// The rows of W that a task works on. `sums` is [tile of x][row][16 rows of x].
template <class Rows>
struct Strip {
  alignas(64) int32_t sums[kMostChunk / kTile][kStripRows][kTile];
  alignas(64) Rows rows[kStripRows];
  int32_t kept[kStripRows];          // sums of the kept values in the current segment
  const int8_t* values[kStripRows];  // what is to be expanded next
  int64_t first, count;              // rows of W
};

using Dense = int32_t[kStripWords * kGroups];
using DenseStrip = Strip<Dense>;
using SkipStrip = Strip<Groups>;

// Calls store(word, mask, values) for each word of a row of the strip.
template <class S, class Store>
void expand_row(const Weight& w, int64_t word, int64_t words, int64_t row, S& s, Store store) {
  const int64_t n = s.first + row;
  const uint64_t* bits = w.bitmask + n * w.words + word;
  const int64_t ahead = w.row_offsets[std::min(n + kStripRows, w.rows)] - w.row_offsets[n];
  const int8_t* values = s.values[row];
  __m512i kept = _mm512_setzero_si512();
  for (int64_t i = 0; i < words; i++) {
    const uint64_t mask = bits[i];
    const __m512i v = _mm512_maskz_expand_epi8((__mmask64)mask, _mm512_loadu_si512(values));
    _mm_prefetch((const char*)values + ahead, _MM_HINT_T1);
    values += _mm_popcnt_u64(mask);
    kept = _mm512_dpbusd_epi32(kept, _mm512_set1_epi8(1), v);
    store(i, mask, v);
  }
  s.values[row] = values;
  s.kept[row] += _mm512_reduce_add_epi32(kept);
}

void expand(const Weight& w, int64_t word, int64_t words, DenseStrip& s) {
  for (int64_t r = 0; r < s.count; r++)
    expand_row(w, word, words, r, s, [&](int64_t i, uint64_t, __m512i v) {
      _mm512_store_si512(s.rows[r] + i * kGroups, v);
    });
}

// Bit g is set where bits 4 g .. 4 g + 3 of the mask are not all clear.
__mmask16 kept_groups(uint64_t mask) {
  uint64_t any = mask | mask >> 1;
  any |= any >> 2;
  return (__mmask16)_pext_u64(any, 0x1111111111111111u);
}

void expand(const Weight& w, int64_t word, int64_t words, SkipStrip& s) {
  const __m512i lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t r = 0; r < s.count; r++) {
    Groups& list = s.rows[r];
    int32_t length = 0;
    list.slab[0] = 0;
    expand_row(w, word, words, r, s, [&](int64_t i, uint64_t mask, __m512i v) {
      const __mmask16 groups = kept_groups(mask);
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(i * kGroups)));
      _mm512_storeu_si512(list.bytes + length, _mm512_maskz_compress_epi32(groups, v));
      _mm256_storeu_si256((__m256i*)(list.index + length),
                          _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(groups, index)));
      length += _mm_popcnt_u32(groups);
      if (i % kSlabWords != kSlabWords - 1 && i != words - 1) return;
      if (length % 2) {  // a group of zeros
        list.index[length] = (uint16_t)(i * kGroups);
        list.bytes[length++] = 0;
      }
      list.slab[i / kSlabWords + 1] = length;
    });
  }
}

// sums += W x of one slab for `Rows` rows and `Tiles` tiles of x; `x` is the first tile's slab.
template <int Rows, int Tiles>
void multiply_rows(DenseStrip& s, int64_t row, int64_t slab, int64_t words, const uint8_t* x,
                   int64_t stride, int64_t tile) {
  __m512i sum[Rows][Tiles];
  for (int r = 0; r < Rows; r++)
    for (int t = 0; t < Tiles; t++) sum[r][t] = _mm512_load_si512(s.sums[tile + t][row + r]);
  const int32_t* bytes = s.rows[row] + slab * kSlabWords * kGroups;
  for (int64_t g = 0; g < words * kGroups; g++) {
    __m512i columns[Tiles];
    for (int t = 0; t < Tiles; t++) columns[t] = _mm512_load_si512(x + t * stride + g * 64);
    for (int r = 0; r < Rows; r++) {
      const __m512i v = _mm512_set1_epi32(bytes[r * kStripWords * kGroups + g]);
      for (int t = 0; t < Tiles; t++) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], columns[t], v);
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int t = 0; t < Tiles; t++) _mm512_store_si512(s.sums[tile + t][row + r], sum[r][t]);
}

// All rows of the strip; rows beyond `count` are multiplied too, and not written.
template <int Tiles>
void multiply(DenseStrip& s, int64_t slab, int64_t words, const uint8_t* x, int64_t stride,
              int64_t tile) {
  constexpr int kRows = Tiles == 1 ? 16 : Tiles == 2 ? 8 : 4;
  for (int64_t row = 0; row < s.count; row += kRows)
    multiply_rows<kRows, Tiles>(s, row, slab, words, x, stride, tile);
}

template <int Tiles>
void multiply(SkipStrip& s, int64_t slab, int64_t, const uint8_t* x, int64_t stride, int64_t tile) {
  const uint8_t* origin = x - slab * kSlabWords * kTileBytes;
  for (int64_t row = 0; row < s.count; row++) {
    const Groups& list = s.rows[row];
    // Two groups at a time, in sums of their own: one chain of additions would be waited for.
    __m512i even[Tiles], odd[Tiles];
    for (int t = 0; t < Tiles; t++) {
      even[t] = _mm512_load_si512(s.sums[tile + t][row]);
      odd[t] = _mm512_setzero_si512();
    }
    for (int32_t i = list.slab[slab]; i < list.slab[slab + 1]; i += 2) {
      const uint8_t* a = origin + (int64_t)list.index[i] * 64;
      const uint8_t* b = origin + (int64_t)list.index[i + 1] * 64;
      const __m512i v = _mm512_set1_epi32(list.bytes[i]), u = _mm512_set1_epi32(list.bytes[i + 1]);
      for (int t = 0; t < Tiles; t++) {
        even[t] = _mm512_dpbusd_epi32(even[t], _mm512_load_si512(a + t * stride), v);
        odd[t] = _mm512_dpbusd_epi32(odd[t], _mm512_load_si512(b + t * stride), u);
      }
    }
    for (int t = 0; t < Tiles; t++)
      _mm512_store_si512(s.sums[tile + t][row], _mm512_add_epi32(even[t], odd[t]));
  }
}

template <class S>
void multiply_chunk(const Weight& w, const ByteTiles& a, int64_t tile, int64_t end, int64_t word,
                    int64_t words, S& s) {
  const int64_t stride = w.words * kTileBytes;
  for (int64_t t = tile; t < end; t += kRunTiles)
    for (int64_t slab = 0; slab * kSlabWords < words; slab++) {
      const int64_t begin = slab * kSlabWords, count = std::min(kSlabWords, words - begin);
      const uint8_t* x = a.tiles + t * stride + (word + begin) * kTileBytes;
      switch (std::min(kRunTiles, end - t)) {
        case 1: multiply<1>(s, slab, count, x, stride, t - tile); break;
        case 2: multiply<2>(s, slab, count, x, stride, t - tile); break;
        case 3: multiply<3>(s, slab, count, x, stride, t - tile); break;
        default: multiply<4>(s, slab, count, x, stride, t - tile); break;
      }
    }
}

template <class S>
void run_strip(const Call& c, const ByteTiles& a, int64_t tile, int64_t end, S& s) {
  const Weight& w = c.weight;
  for (int64_t r = 0; r < s.count; r++)
    s.values[r] = (const int8_t*)w.values + w.row_offsets[s.first + r];
  bool first_segment = true;
  for (int64_t block = 0; block < w.blocks; block++) {
    const int64_t last = std::min(w.words, (block + 1) * w.block_words);
    int64_t word = block * w.block_words;
    do {  // once even without columns: y is the bias then
      const int64_t stop = std::min(last, word + kExactWords);
      memset(s.kept, 0, sizeof(s.kept));
      memset(s.sums, 0, sizeof(s.sums[0]) * (size_t)(end - tile));
      for (; word < stop; word += kStripWords) {
        const int64_t words = std::min(stop - word, kStripWords);
        expand(w, word, words, s);
        multiply_chunk(w, a, tile, end, word, words, s);
      }
      word = stop;
      for (int64_t t = tile; t < end; t++) {
        const avx512::Place place = {s.first, s.count, block, t, first_segment};
        avx512::write_int8_tile(c, place, s.sums[t - tile][0], s.kept);
      }
      first_segment = false;
    } while (word < last);
  }
}

int64_t chunk_tiles(const Weight& w) {
  return avx512::chunk_tokens(w.words * 64, kMostChunk) / kTile;
}

template <class S>
void rows(const Call& c, int64_t begin, int64_t end) {
  const ByteTiles a(c);
  const int64_t tiles = avx512::token_tiles(c.m), chunk = chunk_tiles(c.weight);
  S s;
  // Rows of the strip that no row of W fills stay zero.
  memset((void*)s.rows, 0, sizeof(s.rows));
  for (int64_t tile = 0; tile < tiles; tile += chunk)
    for (int64_t n = begin; n < end; n += kStripRows) {
      s.first = n;
      s.count = std::min(end - n, kStripRows);
      run_strip(c, a, tile, std::min(tiles, tile + chunk), s);
    }
}

bool serves(const Weight& w, int64_t m, int32_t level) {
  return w.type == ZS_INT8 && level == 4 && m >= kLeastTokens;
}

double shared_cost(const Weight& w, int64_t m, double expansion, double product) {
  const double words = (double)w.rows * (double)w.words;
  const double tiles = (double)avx512::token_tiles(m);
  const double chunks =
      (double)((avx512::token_tiles(m) + chunk_tiles(w) - 1) / chunk_tiles(w));
  const double out = (double)w.rows * (double)w.blocks * tiles;
  return words * (expansion * chunks + product * tiles) + 15 * out + 2 * (double)(m * w.columns);
}

double tile_cost(const Weight& w, int64_t m) { return shared_cost(w, m, 7 + 10 * w.density, 16.5); }

double skip_cost(const Weight& w, int64_t m) {
  const double clear = (1 - w.density) * (1 - w.density);
  return shared_cost(w, m, 25, 16 * (1 - clear * clear) * 1.8);
}

size_t workspace(const Weight& w, int64_t m) { return ByteTiles::bytes(w, m); }

int64_t prepare_tasks(const Weight&, int64_t m) { return avx512::token_tiles(m); }

int64_t row_step(const Weight& w, int64_t m) {
  return avx512::token_tiles(m) > chunk_tiles(w) ? 8 * kStripRows : 2 * kStripRows;
}

}  // namespace

extern const Path avx512_int8_tile = {"avx512-int8-tile",
                                      kAvx512 | kAvx512Vnni,
                                      0,
                                      false,
                                      serves,
                                      tile_cost,
                                      nullptr,
                                      workspace,
                                      prepare_tasks,
                                      avx512::prepare_byte_tile,
                                      row_step,
                                      rows<DenseStrip>};

extern const Path avx512_int8_skip = {"avx512-int8-skip",
                                      kAvx512 | kAvx512Vnni,
                                      0,
                                      false,
                                      serves,
                                      skip_cost,
                                      nullptr,
                                      workspace,
                                      prepare_tasks,
                                      avx512::prepare_byte_tile,
                                      row_step,
                                      rows<SkipStrip>};

}  // namespace zs
