// A layout of a weight for many tokens: rows in pairs, so that x is loaded once for both.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "path.h"

namespace zs {

// W is cut into blocks of kBlockRows rows and block_words * 64 columns. In each block on its own,
// its rows are put in pairs (a, b) that keep equally many columns, or nearly:
//
//   a shared entry is a column that both keep, and its two values: one load of x serves two
//   multiplications;
//   a single entry is a column of a, a column of b, and their values. Where one row has run out of
//   columns, its part is a column of the block with a value of 0.
//
// The values and columns of a pair lie shared entries first. Pairs with the same two counts follow
// each other and make a run: loops with counts that repeat are what branch predictors like. The
// order of rows is another one in each block, so their sums must stay in memory between blocks.
struct ThroughputLayout : Form {
  static constexpr int64_t kBlockRows = 128;
  // Columns must fit into uint8_t.
  static constexpr int64_t kMaxBlockWords = 2;
  static constexpr int64_t kMaxBlockColumns = 64 * kMaxBlockWords;
  // The number of a row that is not there: the partner of a row without one. What is summed for it
  // must never be read.
  static constexpr uint8_t kNoRow = kBlockRows;
  // Elements of `values` that can be read beyond the last.
  static constexpr int64_t kPadding = 16;

  struct Run {
    uint16_t pairs, shared, single;
  };

  // Where the parts of a block begin.
  struct Block {
    int64_t run, row, column, value;
  };

  int64_t row_blocks, column_blocks, block_columns;
  std::vector<Block> blocks;           // [row_blocks * column_blocks + 1], row block by row block
  std::vector<Run> runs;
  std::vector<uint8_t> rows;           // two of each pair, relative to the block
  std::unique_ptr<uint8_t[]> columns;  // one of a shared entry, two of a single one; relative
  std::unique_ptr<char[]> values;      // two of each entry, in the type of the weight

  size_t value_size;  // bytes of an element of `values`

  size_t bytes() const override;
};

// Repacks a weight of float32, float16 or bfloat16 values. `block_words`: 1 or 2.
std::unique_ptr<ThroughputLayout> make_throughput_layout(const Weight& weight, int64_t block_words);

}  // namespace zs
