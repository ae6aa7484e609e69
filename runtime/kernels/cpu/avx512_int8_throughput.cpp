// int8 values with 8-bit activations for many rows of x, with VNNI: W in groups of four columns, of
// which those that keep nothing are skipped. Lanes are rows of x; each group is broadcast, and
// multiplied with up to four tiles of x.
#include <algorithm>
#include <cstring>
#include <vector>

#include "avx512_int8_strip.h"

namespace zs {
namespace {

using avx512::ByteTiles;
using avx512::kTile;
using avx512::kTileBytes;

constexpr int64_t kRows = 64;      // rows of W whose sums stay in cache, and that one part of x serves
constexpr int64_t kPartWords = 4;  // words whose x stays in the L1 cache: 16 KiB of four tiles
constexpr int64_t kMostTiles = 4;
constexpr int64_t kLeastTokens = 5;
constexpr double kMostDensity = 0.2;  // above, a dense product is as fast, and needs no copy

// A weight cut into blocks of kRows rows and parts of kPartWords words. The groups of a row that
// keep something lie one after the other, and so do the rows of a part of a block, those with fewest
// groups first: loops with counts that repeat are what branch predictors like.
struct GroupLayout : Form {
  struct Part {
    int64_t word, words, block;
    int64_t segment;   // parts that are summed up in 32 bits, which they fit into
    bool first, last;  // of its segment
  };

  int64_t row_blocks = 0, segments = 0;
  std::vector<Part> parts;
  std::vector<int64_t> starts;   // [row_blocks * parts]: the first group of a part of a block
  std::vector<uint8_t> rows;     // [row_blocks * parts, kRows], relative to the block
  std::vector<uint8_t> counts;   // [row_blocks * parts, kRows], of groups
  std::vector<uint8_t> places;   // of a group in its part
  std::vector<int32_t> weights;  // of a group: four int8
  std::vector<int32_t> kept;     // [segments, rows of W]: the sum of what is kept

  size_t bytes() const override {
    return parts.size() * sizeof(Part) + starts.size() * 8 + rows.size() + counts.size() +
           places.size() + 4 * (weights.size() + kept.size());
  }
};

std::vector<GroupLayout::Part> cut(const Weight& w) {
  std::vector<GroupLayout::Part> parts;
  int64_t segment = 0;
  for (int64_t block = 0; block < w.blocks; block++) {
    const int64_t last = std::min(w.words, (block + 1) * w.block_words);
    int64_t word = block * w.block_words;
    do {  // once even without columns: y is the bias then
      const int64_t begin = word, stop = std::min(last, word + avx512::kExactWords);
      do {
        const int64_t words = std::min(stop - word, kPartWords);
        parts.push_back({word, words, block, segment, word == begin, word + words >= stop});
        word += words;
      } while (word < stop);
      segment++;
    } while (word < last);
  }
  return parts;
}

// The groups of one part of a block of rows.
struct Block {
  alignas(64) int32_t weights[kRows][16 * kPartWords + 16];
  uint8_t places[kRows][16 * kPartWords];
  int counts[kRows];

  // Takes words of row n of W, whose values begin at `values`; returns the sum of what is kept.
  int32_t read(const Weight& w, int64_t row, int64_t n, const GroupLayout::Part& part,
               const int8_t*& values) {
    int count = 0;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < part.words; i++) {
      const uint64_t mask = w.bitmask[n * w.words + part.word + i];
      const __m512i v = _mm512_maskz_expand_epi8((__mmask64)mask, _mm512_loadu_si512(values));
      values += _mm_popcnt_u64(mask);
      avx512::add_products(sum, _mm512_set1_epi8(1), v);
      uint32_t some = _mm512_test_epi32_mask(v, v);
      _mm512_storeu_si512(weights[row] + count, _mm512_maskz_compress_epi32((__mmask16)some, v));
      for (; some; some &= some - 1)
        places[row][count++] = (uint8_t)(16 * i + _tzcnt_u32(some));
    }
    counts[row] = count;
    return _mm512_reduce_add_epi32(sum);
  }

  void append_to(GroupLayout& layout, int64_t rows) const {
    uint8_t order[kRows];
    for (int64_t r = 0; r < rows; r++) order[r] = (uint8_t)r;
    std::stable_sort(order, order + rows,
                     [&](uint8_t a, uint8_t b) { return counts[a] < counts[b]; });
    for (int64_t i = 0; i < kRows; i++) {
      const int64_t row = i < rows ? order[i] : 0;
      const int count = i < rows ? counts[row] : 0;
      layout.rows.push_back((uint8_t)row);
      layout.counts.push_back((uint8_t)count);
      layout.places.insert(layout.places.end(), places[row], places[row] + count);
      layout.weights.insert(layout.weights.end(), weights[row], weights[row] + count);
    }
  }
};

std::unique_ptr<Form> make_form(const Weight& w) {
  std::unique_ptr<GroupLayout> layout(new GroupLayout);
  layout->parts = cut(w);
  layout->segments = layout->parts.back().segment + 1;
  layout->row_blocks = (w.rows + kRows - 1) / kRows;
  layout->kept.assign((size_t)(layout->segments * w.rows), 0);
  std::unique_ptr<Block> block(new Block);
  for (int64_t first = 0; first < w.rows; first += kRows) {
    const int64_t rows = std::min(kRows, w.rows - first);
    const int8_t* values[kRows];
    for (int64_t r = 0; r < rows; r++)
      values[r] = (const int8_t*)w.values + w.row_offsets[first + r];
    for (const GroupLayout::Part& part : layout->parts) {
      layout->starts.push_back((int64_t)layout->weights.size());
      for (int64_t r = 0; r < rows; r++)
        layout->kept[(size_t)(part.segment * w.rows + first + r)] +=
            block->read(w, r, first + r, part, values[r]);
      block->append_to(*layout, rows);
    }
  }
  layout->places.shrink_to_fit();
  layout->weights.shrink_to_fit();
  return layout;
}

// The sums of a block of rows, [tiles of x][rows of W][rows of x].
struct alignas(64) Sums {
  int32_t lanes[kMostTiles][kRows][kTile];
};

// Adds one part of a block of rows; `x` is its part of the first tile.
template <int Tiles>
void add_part(const GroupLayout& layout, size_t index, int64_t rows, const uint8_t* x,
              int64_t x_stride, bool first, Sums& sums) {
  // With few tiles, several sums hide the latency of a product.
  constexpr int kSums = Tiles == 1 ? 4 : 2;
  const uint8_t* const order = layout.rows.data() + index * kRows;
  const uint8_t* const counts = layout.counts.data() + index * kRows;
  const uint8_t* place = layout.places.data() + layout.starts[index];
  const int32_t* weight = layout.weights.data() + layout.starts[index];
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = order[i];
    __m512i sum[kSums][Tiles];
    ZS_UNROLL
    for (int t = 0; t < Tiles; t++) {
      sum[0][t] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums.lanes[t][row]);
      ZS_UNROLL
      for (int s = 1; s < kSums; s++) sum[s][t] = _mm512_setzero_si512();
    }
    const auto add = [&](int64_t j, __m512i(&own)[Tiles]) {
      const uint8_t* const from = x + 64 * (int64_t)place[j];
      const __m512i four = _mm512_set1_epi32(weight[j]);
      ZS_UNROLL
      for (int t = 0; t < Tiles; t++)
        avx512::add_products(own[t], _mm512_load_si512(from + t * x_stride), four);
    };
    const int64_t count = counts[i];
    int64_t j = 0;
    for (; j + kSums <= count; j += kSums) {
      ZS_UNROLL
      for (int s = 0; s < kSums; s++) add(j + s, sum[s]);
    }
    if (kSums > 1)
      for (; j < count; j++) add(j, sum[0]);
    place += count;
    weight += count;
    ZS_UNROLL
    for (int t = 0; t < Tiles; t++) {
      ZS_UNROLL
      for (int s = 1; s < kSums; s++) sum[0][t] = _mm512_add_epi32(sum[0][t], sum[s][t]);
      _mm512_store_si512(sums.lanes[t][row], sum[0][t]);
    }
  }
}

// y of a block of rows and `Tiles` tiles of x.
template <int Tiles>
void multiply(const Call& c, int64_t row, int64_t tile, Sums& sums) {
  const Weight& w = c.weight;
  const GroupLayout& layout = *(const GroupLayout*)c.form;
  const ByteTiles x(c);
  const int64_t rows = std::min(kRows, w.rows - row), stride = w.words * kTileBytes;
  size_t index = (size_t)(row / kRows) * layout.parts.size();
  for (const GroupLayout::Part& part : layout.parts) {
    add_part<Tiles>(layout, index++, rows, x.tiles + tile * stride + part.word * kTileBytes, stride,
                    part.first, sums);
    if (!part.last) continue;
    const int32_t* const kept = layout.kept.data() + part.segment * w.rows + row;
    for (int t = 0; t < Tiles; t++)
      for (int64_t r = 0; r < rows; r += kTile) {
        const int64_t count = std::min<int64_t>(kTile, rows - r);
        int32_t own[kTile] = {};
        memcpy(own, kept + r, sizeof(int32_t) * (size_t)count);
        const avx512::Place place = {row + r, count, part.block, tile + t, part.segment == 0};
        avx512::write_int8_tile(c, place, sums.lanes[t][r], own);
      }
  }
}

// Tiles of x in runs of about the same length.
struct Runs {
  int64_t tiles, count;

  explicit Runs(int64_t m)
      : tiles(avx512::token_tiles(m)), count((tiles + kMostTiles - 1) / kMostTiles) {}
  int64_t begin(int64_t run) const { return tiles * run / count; }
};

void rows(const Call& c, int64_t begin, int64_t end) {
  using Multiply = void (*)(const Call&, int64_t, int64_t, Sums&);
  static constexpr Multiply kMultiply[kMostTiles] = {multiply<1>, multiply<2>, multiply<3>,
                                                     multiply<4>};
  Sums sums;
  const Runs runs(c.m);
  for (int64_t row = begin; row < end; row += kRows)
    for (int64_t run = 0; run < runs.count; run++) {
      const int64_t first = runs.begin(run);
      kMultiply[runs.begin(run + 1) - first - 1](c, row, first, sums);
    }
}

bool serves(const Weight& w, int64_t m, int32_t accuracy_level) {
  return w.type == ZS_INT8 && accuracy_level == 4 && m >= kLeastTokens && w.density < kMostDensity;
}

double cost(const Weight& w, int64_t m) {
  const Runs runs(m);
  const double some = 1 - (1 - w.density) * (1 - w.density) * (1 - w.density) * (1 - w.density);
  const double groups = some * (double)w.rows * (double)w.columns / 4;
  const double parts = (double)w.rows * (double)((w.words + kPartWords - 1) / kPartWords);
  return (double)runs.count * (1.5 * groups + 20 * parts) +
         (double)runs.tiles * (0.6 * groups + 2 * parts + 15 * (double)w.rows) +
         2 * (double)m * (double)w.columns;
}

int64_t row_step(const Weight&, int64_t) { return kRows; }

}  // namespace

extern const Path avx512_int8_throughput = {"avx512-int8-throughput",
                                            kAvx512 | kAvx512Vnni,
                                            1,
                                            false,
                                            serves,
                                            cost,
                                            make_form,
                                            avx512::strips_workspace,
                                            avx512::strips_prepare_tasks,
                                            avx512::prepare_byte_tile,
                                            row_step,
                                            rows};

}  // namespace zs
