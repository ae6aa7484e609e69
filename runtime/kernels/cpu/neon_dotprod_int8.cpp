// The NEON kernel for 8-bit activations with dot-product instructions (ARMv8.2 and later).
//
// sdot multiplies signed bytes, so activations are stored as q - 128 and the zero point is made up
// for with the sum of the weights. Checked under an emulator only: nobody has timed it.
#include "neon_int8.h"
#include "path.h"
#include "simd_int8.h"

namespace zs {
namespace {

struct NeonDotInt8 : NeonInt8Base<NeonDotInt8> {
  using Element = int8_t;
  static constexpr int kStep = 16, kFixedOffset = 128;

  static int8x16_t load(const int8_t* from) { return vld1q_s8(from); }
  static Sum accumulate(Sum sum, int8x16_t w, int8x16_t x) { return vdotq_s32(sum, w, x); }

  static const int8_t* unpack(const int8_t* value, uint64_t bits, int8_t* to) {
    const uint64_t count = counts(bits);
    for (int i = 0; i < 64; i += 8) {
      vst1_s8(to + i, expand(value, bits >> i & 255));
      value += count >> i & 255;
    }
    return value;
  }
};

using Loops = SimdInt8<NeonDotInt8>;

double cost(const Weight& w, int64_t m) {
  return (double)w.rows * (double)w.columns * (0.35 + 0.04 * (double)m);
}

}  // namespace

extern const Path neon_dotprod_int8 = {"neon-dotprod-int8",
                                  kNeon | kNeonDot,
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
