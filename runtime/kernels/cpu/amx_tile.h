// What the AMX kernels share.
//
// A product of tiles is C[16 rows of W][16 rows of x] += A B. A row of A is 64 bytes of one row of
// W, just as vpexpand leaves them. B holds x in groups of 4 bytes: group g of row j of x lies at
// [g][j]; it is laid out once, for all rows of W. C is turned round when it is written to y.
//
// The numbers of tile registers must be literals: 0..3 hold C, 4 and 5 hold A, 6 and 7 hold B.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>

#include "avx512_tokens.h"

namespace zs {
namespace amx {

constexpr int kTile = avx512::kTile;  // rows of a tile
constexpr int64_t kTileBytes = avx512::kTileBytes;

// All eight tile registers as 16 rows of 64 bytes, for as long as it lives: the state belongs to
// the thread, and a thread that keeps it pays for it at every switch.
class TileScope {
 public:
  TileScope() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;  // bytes in a row, 16 bits each
      config[48 + i] = kTile;
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Compilers do not see that a tile load reads memory: stores before this stay before it.
inline void stores_done() { std::atomic_signal_fence(std::memory_order_seq_cst); }

}  // namespace amx
}  // namespace zs
