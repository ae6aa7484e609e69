#include "throughput_layout.h"

#include <algorithm>

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace zs {
namespace {

using Layout = ThroughputLayout;

// The number of shared entries is rounded down to a multiple of this: then fewer runs differ, and
// a column that both keep can as well be a single entry.
constexpr int kSharedStep = 4;

// How many rows with equally many columns are looked at for the one that shares most.
constexpr int kCandidates = 6;

// In plain arithmetic: this file is built for any CPU, where the builtin may be a slow call.
int count_bits(uint64_t word) {
  word -= word >> 1 & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
  return (int)(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

int lowest_bit(uint64_t word) {
#ifdef _MSC_VER
  unsigned long index;
  _BitScanForward64(&index, word);
  return (int)index;
#else
  return __builtin_ctzll(word);
#endif
}

// The bitmask of a row within a block of columns.
template <int size>
struct Mask {
  uint64_t words[size] = {};

  int count() const {
    int sum = 0;
    for (const uint64_t word : words) sum += count_bits(word);
    return sum;
  }
};

template <int size>
Mask<size> operator&(const Mask<size>& a, const Mask<size>& b) {
  Mask<size> both;
  for (int i = 0; i < size; i++) both.words[i] = a.words[i] & b.words[i];
  return both;
}

// Calls body(column) for each column of a mask in turn.
template <int size, class Body>
void for_columns(const Mask<size>& mask, Body&& body) {
  for (int i = 0; i < size; i++)
    for (uint64_t left = mask.words[i]; left; left &= left - 1) body(i * 64 + lowest_bit(left));
}

struct Pair {
  uint8_t first, second;
  int shared, single;

  int entries() const { return shared + single; }
};

// The rows of one block of W.
template <int size>
struct BlockRows {
  Mask<size> masks[Layout::kBlockRows + 1];  // the last: no row
  int counts[Layout::kBlockRows + 1];

  void read(const Weight& w, int64_t first_row, int64_t rows, int64_t first_word) {
    const int64_t words = std::min<int64_t>(size, w.words - first_word);
    for (int64_t r = 0; r < rows; r++) {
      masks[r] = {};
      const uint64_t* bits = w.bitmask + (first_row + r) * w.words + first_word;
      std::copy(bits, bits + words, masks[r].words);
      counts[r] = masks[r].count();
    }
    masks[Layout::kNoRow] = {};
    counts[Layout::kNoRow] = 0;
  }

  // Puts the rows in pairs, the longest first; rows without a column in none. Returns how many.
  int pair(int64_t rows, Pair* pairs) const {
    uint8_t order[Layout::kBlockRows + 1];
    int left = 0;
    for (int64_t r = 0; r < rows; r++)
      if (counts[r]) order[left++] = (uint8_t)r;
    std::sort(order, order + left, [&](uint8_t a, uint8_t b) {
      return counts[a] != counts[b] ? counts[a] > counts[b] : a < b;
    });
    if (left % 2) order[left++] = Layout::kNoRow;
    for (int i = 0; i < left; i += 2) {
      const int end = std::min(left, i + 1 + kCandidates);
      int best = i + 1, most = -1;
      for (int j = i + 1; j < end && counts[order[j]] == counts[order[i + 1]]; j++) {
        const int shared = (masks[order[i]] & masks[order[j]]).count();
        if (shared > most) most = shared, best = j;
      }
      // The order of the others is kept.
      std::rotate(order + i + 1, order + best, order + best + 1);
      const int shared = most / kSharedStep * kSharedStep;
      pairs[i / 2] = {order[i], order[i + 1], shared, counts[order[i]] - shared};
    }
    std::sort(pairs, pairs + left / 2, [](const Pair& a, const Pair& b) {
      if (a.entries() != b.entries()) return a.entries() > b.entries();
      return a.shared != b.shared ? a.shared > b.shared : a.first < b.first;
    });
    return left / 2;
  }
};

// Decides all pairs: fills `blocks`, `runs` and `rows`.
template <int size>
void plan(const Weight& w, Layout* layout) {
  BlockRows<size> block;
  Pair pairs[Layout::kBlockRows];
  Layout::Block at = {0, 0, 0, 0};
  layout->blocks.reserve((size_t)(layout->row_blocks * layout->column_blocks + 1));
  layout->rows.reserve((size_t)((w.rows + layout->row_blocks) * layout->column_blocks));
  for (int64_t row = 0; row < w.rows; row += Layout::kBlockRows)
    for (int64_t word = 0; word < w.words; word += size) {
      layout->blocks.push_back(at);
      const int64_t rows = std::min(Layout::kBlockRows, w.rows - row);
      block.read(w, row, rows, word);
      const int count = block.pair(rows, pairs);
      for (int i = 0; i < count; i++) {
        const Pair& p = pairs[i];
        if (i && p.shared == pairs[i - 1].shared && p.single == pairs[i - 1].single)
          layout->runs.back().pairs++;
        else
          layout->runs.push_back({1, (uint16_t)p.shared, (uint16_t)p.single});
        layout->rows.push_back(p.first);
        layout->rows.push_back(p.second);
        at.column += p.shared + 2 * p.single;
        at.value += 2 * p.entries();
      }
      at.run = (int64_t)layout->runs.size();
      at.row = (int64_t)layout->rows.size();
    }
  layout->blocks.push_back(at);
  layout->runs.shrink_to_fit();
}

// One row of a pair: its columns, and its values by column.
template <int size, class T>
struct Side {
  Mask<size> left;
  T values[64 * size];

  // `next` is where the values of the row in this block begin; it is moved on.
  void read(const Mask<size>& mask, const T** next) {
    left = mask;
    const T* value = *next;
    for_columns(mask, [&](int column) { values[column] = *value++; });
    *next = value;
  }

  // Appends the columns of `left`, and zeros up to `count`, to every other place.
  void write(int count, uint8_t* columns, T* out) const {
    int i = 0;
    for_columns(left, [&](int column) {
      columns[2 * i] = (uint8_t)column;
      out[2 * i++] = values[column];
    });
    for (; i < count; i++) columns[2 * i] = 0, out[2 * i] = T(0);
  }
};

// Fills `columns` and `values` as planned.
template <int size, class T>
void fill(const Weight& w, Layout* layout) {
  const T* const stored = (const T*)w.values;
  std::vector<const T*> next((size_t)Layout::kBlockRows + 1);
  Side<size, T> a, b;
  BlockRows<size> block;
  uint8_t* column = layout->columns.get();
  T* value = (T*)layout->values.get();
  const Layout::Block* at = layout->blocks.data();
  for (int64_t row = 0; row < w.rows; row += Layout::kBlockRows) {
    const int64_t rows = std::min(Layout::kBlockRows, w.rows - row);
    for (int64_t r = 0; r < rows; r++) next[(size_t)r] = stored + w.row_offsets[row + r];
    for (int64_t word = 0; word < w.words; word += size, at++) {
      block.read(w, row, rows, word);
      const uint8_t* pair = layout->rows.data() + at->row;
      for (int64_t run = at->run; run < at[1].run; run++) {
        const int shared = layout->runs[(size_t)run].shared;
        const int single = layout->runs[(size_t)run].single;
        for (int i = 0; i < layout->runs[(size_t)run].pairs; i++, pair += 2) {
          a.read(block.masks[pair[0]], &next[pair[0]]);
          b.read(block.masks[pair[1]], &next[pair[1]]);
          const Mask<size> both = a.left & b.left;
          int wanted = shared;
          for_columns(both, [&](int k) {
            if (wanted == 0) return;
            wanted--;
            const uint64_t others = ~((uint64_t)1 << k % 64);
            a.left.words[k / 64] &= others;
            b.left.words[k / 64] &= others;
            *column++ = (uint8_t)k;
            *value++ = a.values[k];
            *value++ = b.values[k];
          });
          a.write(single, column, value);
          b.write(single, column + 1, value + 1);
          column += 2 * single;
          value += 2 * single;
        }
      }
    }
  }
  std::fill(value, value + Layout::kPadding, T(0));
}

template <int size>
std::unique_ptr<ThroughputLayout> make(const Weight& w) {
  std::unique_ptr<Layout> layout(new Layout);
  layout->row_blocks = (w.rows + Layout::kBlockRows - 1) / Layout::kBlockRows;
  layout->column_blocks = (w.words + size - 1) / size;
  layout->block_columns = size * 64;
  layout->value_size = value_bytes(w.type);
  plan<size>(w, layout.get());
  // Not std::vector: it would clear tens of megabytes that are written anyway.
  const Layout::Block& end = layout->blocks.back();
  layout->columns.reset(new uint8_t[(size_t)end.column]);
  layout->values.reset(new char[(size_t)(end.value + Layout::kPadding) * layout->value_size]);
  if (layout->value_size == 4)
    fill<size, float>(w, layout.get());
  else
    fill<size, uint16_t>(w, layout.get());
  return layout;
}

}  // namespace

size_t ThroughputLayout::bytes() const {
  return sizeof(*this) + blocks.capacity() * sizeof(Block) + runs.capacity() * sizeof(Run) +
         rows.capacity() + (size_t)blocks.back().column +
         (size_t)(blocks.back().value + kPadding) * value_size;
}

std::unique_ptr<ThroughputLayout> make_throughput_layout(const Weight& w, int64_t block_words) {
  return block_words == 1 ? make<1>(w) : make<2>(w);
}

}  // namespace zs
