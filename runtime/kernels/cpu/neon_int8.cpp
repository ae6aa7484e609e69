// The NEON kernel for 8-bit activations without dot-product instructions: 16-bit products.
//
// Checked under an emulator only: nobody has timed it.
#include "neon_int8.h"
#include "path.h"
#include "simd_int8.h"

namespace zs {
namespace {

struct NeonInt8 : NeonInt8Base<NeonInt8> {
  using Element = int16_t;
  static constexpr int kStep = 8, kFixedOffset = -1;

  static int16x8_t load(const int16_t* from) { return vld1q_s16(from); }
  static Sum accumulate(Sum sum, int16x8_t w, int16x8_t x) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(w), vget_low_s16(x)), w, x);
  }

  static const int8_t* unpack(const int8_t* value, uint64_t bits, int16_t* to) {
    const uint64_t count = counts(bits);
    for (int i = 0; i < 64; i += 8) {
      vst1q_s16(to + i, vmovl_s8(expand(value, bits >> i & 255)));
      value += count >> i & 255;
    }
    return value;
  }
};

using Loops = SimdInt8<NeonInt8>;

double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.columns * (0.4 + 0.15 * (double)m);
}

}  // namespace

extern const Path neon_int8 = {"neon-int8",
                               kNeon,
                               0,
                               false,
                               Loops::serves,
                               cost,
                               nullptr,
                               Loops::workspace,
                               Loops::prepare_tasks,
                               Loops::prepare,
                               Loops::step,
                               Loops::rows};

}  // namespace zs
