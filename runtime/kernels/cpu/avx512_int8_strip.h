// int8 values with 8-bit activations for many rows of x: what VNNI and AMX share.
//
// W is expanded strip by strip into the cache, and each expansion serves a chunk of rows of x. What
// multiplies a strip differs, and is a parameter of `multiply_strips`.
//
// Only files that are compiled for AVX-512 may include this.
#pragma once

#include <algorithm>
#include <cstring>

#include "avx512_tokens.h"
#include "path.h"

namespace zs {
namespace avx512 {

constexpr int kStripRows = 32;
constexpr int64_t kStripWords = 8;    // words of the rows that are expanded at once
constexpr int64_t kMostChunk = 256;   // rows of x in a chunk
constexpr int64_t kExactWords = 512;  // 255 * 128 * 64 * 512 < 2^31: sums of 32 bits are exact

// Rows of W that a task works on. What lies beyond `count` is multiplied too, and not written.
struct Int8Strip {
  alignas(64) int8_t bytes[kStripWords][kStripRows][64];
  alignas(64) int32_t sums[kMostChunk / kTile][kStripRows][kTile];  // [tile of x][row][row of x]
  int32_t kept[kStripRows];          // sums of the kept values in the current segment
  const int8_t* values[kStripRows];  // what is to be expanded next
  int64_t first, count;              // rows of W
};

// What a strip is multiplied with: `words` words from `word` on of the tiles of x from `tile` to
// `end`. `first`: the sums begin at zero.
struct Int8Product {
  int64_t tile, end;
  int64_t word, words;
  bool first;
};

// Expands `words` words of each row from `word` on, and adds to `kept`.
void expand_strip(const Weight& w, int64_t word, int64_t words, Int8Strip& s);

inline int64_t chunk_tiles(const Weight& w) {
  return chunk_tokens(w.words * 64, kMostChunk) / kTile;
}

// y of a strip and the tiles of x from `tile` to `end`. `Multiply` is called as
// multiply(weight, tiles of x, strip, product).
template <class Multiply>
void run_strip(const Call& c, int64_t tile, int64_t end, Int8Strip& s, const Multiply& multiply) {
  const Weight& w = c.weight;
  const ByteTiles x(c);
  for (int64_t r = 0; r < s.count; r++)
    s.values[r] = (const int8_t*)w.values + w.row_offsets[s.first + r];
  bool first_segment = true;
  for (int64_t block = 0; block < w.blocks; block++) {
    const int64_t last = std::min(w.words, (block + 1) * w.block_words);
    int64_t word = block * w.block_words;
    do {  // once even without columns: y is the bias then
      const int64_t begin = word, stop = std::min(last, word + kExactWords);
      memset(s.kept, 0, sizeof(s.kept));
      do {
        const int64_t words = std::min(stop - word, kStripWords);
        expand_strip(w, word, words, s);
        multiply(w, x, s, Int8Product{tile, end, word, words, word == begin});
        word += words;
      } while (word < stop);
      for (int64_t t = tile; t < end; t++)
        for (int64_t row = 0; row < s.count; row += kTile) {
          const int64_t rows = std::min<int64_t>(kTile, s.count - row);
          const Place place = {s.first + row, rows, block, t, first_segment};
          write_int8_tile(c, place, s.sums[t - tile][row], s.kept + row);
        }
      first_segment = false;
    } while (word < last);
  }
}

// Path::rows.
template <class Multiply>
void multiply_strips(const Call& c, int64_t begin, int64_t end, const Multiply& multiply) {
  const int64_t tiles = token_tiles(c.m), chunk = chunk_tiles(c.weight);
  Int8Strip strip;
  // Rows that no row of W fills stay zero.
  memset(strip.bytes, 0, sizeof(strip.bytes));
  for (int64_t tile = 0; tile < tiles; tile += chunk)
    for (int64_t n = begin; n < end; n += kStripRows) {
      strip.first = n;
      strip.count = std::min<int64_t>(end - n, kStripRows);
      run_strip(c, tile, std::min(tiles, tile + chunk), strip, multiply);
    }
}

// The rest of the Path. `cost` is that of expanding a word, and of its product with a tile of x.
bool strips_serve(const Weight& w, int64_t m, int32_t accuracy_level);
double strips_cost(const Weight& w, int64_t m, double expansion, double product);
size_t strips_workspace(const Weight& w, int64_t m);
int64_t strips_prepare_tasks(const Weight& w, int64_t m);
int64_t strips_row_step(const Weight& w, int64_t m);

}  // namespace avx512
}  // namespace zs
