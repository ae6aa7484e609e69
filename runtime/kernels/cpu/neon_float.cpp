// The NEON kernels for float activations; simd_loops.h holds their loops.
//
// Checked under an emulator only: nobody has timed them, so the costs are estimates that order the
// kernels by the work they do.
#include <arm_neon.h>

#include "path.h"
#include "simd_loops.h"

namespace zs {
namespace {

// For each 4 bits of a bitmask: which bytes of the next 4 values go to each lane; 255 makes zeros.
struct ExpandTable {
  alignas(64) uint8_t bytes[16][16];
};

constexpr ExpandTable make_table() {
  ExpandTable table = {};
  for (int bits = 0; bits < 16; bits++) {
    int next = 0;
    for (int lane = 0; lane < 4; lane++) {
      const bool kept = bits >> lane & 1;
      for (int byte = 0; byte < 4; byte++)
        table.bytes[bits][lane * 4 + byte] = kept ? (uint8_t)(next * 4 + byte) : (uint8_t)255;
      next += kept;
    }
  }
  return table;
}

constexpr ExpandTable kExpand = make_table();

constexpr uint8_t kCount[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

struct Neon {
  using Vector = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kTokens = 4;  // 16 sums, 4 of x and 1 of W, of 32 registers
  static constexpr int kPanel = 8;

  static Vector zero() { return vdupq_n_f32(0); }
  static Vector set(float value) { return vdupq_n_f32(value); }
  static Vector load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Vector v) { vst1q_f32(to, v); }
  static Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }

  static Vector load_values(const float* from) { return load(from); }
  static Vector load_values(const Float16* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from)));
  }
  static Vector load_values(const BFloat16* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)from), 16));
  }
  static Vector load_values(const int8_t* from) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(from)))));
  }

  static Vector expand(Vector values, uint32_t bits) {
    const uint8x16_t bytes = vld1q_u8(kExpand.bytes[bits]);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(values), bytes));
  }

  static float sum(Vector v) { return vaddvq_f32(v); }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }

  static int count(uint32_t bits) { return kCount[bits]; }
  static int count(uint64_t bits) { return vaddv_u8(vcnt_u8(vcreate_u8(bits))); }

  static int first(uint64_t bits) {
#ifdef _MSC_VER
    return (int)_CountTrailingZeros64(bits);
#else
    return __builtin_ctzll(bits);
#endif
  }

  static void prefetch(const char* address) {
#ifdef _MSC_VER
    __prefetch(address);
#else
    __builtin_prefetch(address);
#endif
  }
};

using Loops = SimdLoops<Neon>;

double elements(const Weight& w) { return (double)w.rows * (double)w.columns; }

double dot_cost(const Weight& w, int64_t m) {
  const double groups = (double)((m + 3) / 4);
  return elements(w) * (groups * 0.6 + (double)m * 0.12);
}

double tile_cost(const Weight& w, int64_t m) { return elements(w) * (0.7 + (double)m * 0.15); }

double skip_cost(const Weight& w, int64_t m) {
  const double panels = (double)((m + Loops::kPanelTokens - 1) / Loops::kPanelTokens);
  return elements(w) * panels * (0.15 + 5.2 * w.density) + (double)w.columns * (double)m * 2;
}

}  // namespace

extern const Path neon_dot = {"neon-dot",       kNeon,      0,
                              false,            Loops::serves, dot_cost,
                              nullptr,          Loops::padded_bytes, Loops::pad_tasks,
                              Loops::pad,       Loops::dot_step,     Loops::dot_rows};

extern const Path neon_tile = {"neon-tile",      kNeon,      0,
                               false,            Loops::serves, tile_cost,
                               nullptr,          Loops::padded_bytes, Loops::pad_tasks,
                               Loops::pad,       Loops::tile_step,    Loops::tile_rows};

extern const Path neon_skip = {"neon-skip",      kNeon,      0,
                               true,             Loops::serves, skip_cost,
                               nullptr,          Loops::panel_bytes, Loops::panel_tasks,
                               Loops::panel,     Loops::skip_step,   Loops::skip_rows};

}  // namespace zs
