// What the two NEON kernels for 8-bit activations share; a type of the file derives from it.
#pragma once

#include <arm_neon.h>

#include "quantize.h"

namespace zs {

// For each byte of a bitmask: which of the next 8 values goes to each lane; 255 makes a zero.
struct NeonBytes {
  alignas(64) uint8_t lanes[256][8];
};

constexpr NeonBytes make_neon_bytes() {
  NeonBytes table = {};
  for (int byte = 0; byte < 256; byte++) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; lane++)
      table.lanes[byte][lane] = byte >> lane & 1 ? next++ : (uint8_t)255;
  }
  return table;
}

constexpr NeonBytes kNeonBytes = make_neon_bytes();

// `Own` is the type that derives from this, so that each file has its own copy.
template <class Own>
struct NeonInt8Base {
  using Sum = int32x4_t;
  static constexpr int kTokens = 4;

  static Sum zero() { return vdupq_n_s32(0); }

  static void sum4(Sum a, Sum b, Sum c, Sum d, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }

  static int8x8_t expand(const int8_t* value, uint32_t byte) {
    // A table of 16 bytes, half of it zeros: vqtbl1 answers 0 for 255.
    const int8x16_t next = vcombine_s8(vld1_s8(value), vdup_n_s8(0));
    return vqtbl1_s8(next, vld1_u8(kNeonBytes.lanes[byte]));
  }

  // Bits in each byte of a word, so that eight expansions need not count one by one.
  static uint64_t counts(uint64_t bits) {
    return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(bits))), 0);
  }

  static RowScale range(const float* x, int64_t columns) {
    float low = 0, high = 0;
    bool finite = true;
    for (int64_t k = 0; k < columns; k++) {
      low = std::min(low, x[k]);
      high = std::max(high, x[k]);
      finite &= std::isfinite(x[k]);
    }
    if (!finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
    return row_scale(low, high);
  }

  template <class Element>
  static void quantize_row(const float* x, int64_t columns, const RowScale& row, int32_t offset,
                           Element* to) {
    for (int64_t k = 0; k < columns; k++) to[k] = (Element)((int32_t)quantize(x[k], row) - offset);
  }

  static void prefetch(const char* address) {
#ifdef _MSC_VER
    __prefetch(address);
#else
    __builtin_prefetch(address);
#endif
  }
};

}  // namespace zs
