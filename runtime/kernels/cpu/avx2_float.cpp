// The AVX2 kernels for float activations; simd_loops.h holds their loops.
#include <immintrin.h>

#include "path.h"
#include "simd_loops.h"

namespace zs {
namespace {

// For each byte of a bitmask: which of the next values goes to each lane, and a sign bit in the
// lanes that get none. vpermps reads the low 3 bits only.
struct ExpandTable {
  alignas(64) uint32_t lanes[256][8];
};

constexpr ExpandTable make_table() {
  ExpandTable table = {};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t next = 0;
    for (int lane = 0; lane < 8; lane++)
      table.lanes[byte][lane] = byte >> lane & 1 ? next++ : 0x80000000u;
  }
  return table;
}

constexpr ExpandTable kExpand = make_table();

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTokens = 3;  // 3 x 4 sums, 3 of x and 1 of W: all 16 registers
  static constexpr int kPanel = 4;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector set(float value) { return _mm256_set1_ps(value); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  static Vector load_values(const float* from) { return load(from); }
  static Vector load_values(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  }
  static Vector load_values(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Vector load_values(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
  }

  static Vector expand(Vector values, uint32_t bits) {
    const __m256i lanes = _mm256_load_si256((const __m256i*)kExpand.lanes[bits]);
    const __m256 empty = _mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31));
    return _mm256_andnot_ps(empty, _mm256_permutevar8x32_ps(values, lanes));
  }

  static float sum(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }

  static int count(uint64_t bits) { return (int)_mm_popcnt_u64(bits); }
  static int first(uint64_t bits) { return (int)_tzcnt_u64(bits); }
  static void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }
};

using Loops = SimdLoops<Avx2>;

double elements(const Weight& w) { return (double)w.rows * (double)w.columns; }

// Cycles, the least of many runs of 512 x 1024 weights in the cache of a busy Sapphire Rapids core.
double dot_cost(const Weight& w, int64_t m) {
  const double groups = (double)((m + 3) / 4);
  return elements(w) * (groups * 0.6 + (double)m * 0.11);
}

double tile_cost(const Weight& w, int64_t m) { return elements(w) * (0.65 + (double)m * 0.11); }

double skip_cost(const Weight& w, int64_t m) {
  const double panels = (double)((m + Loops::kPanelTokens - 1) / Loops::kPanelTokens);
  return elements(w) * panels * (0.75 + 4.7 * w.density) + (double)w.columns * (double)m * 2;
}

}  // namespace

extern const Path avx2_dot = {"avx2-dot",       kAvx2,      0,
                              false,            Loops::serves, dot_cost,
                              nullptr,          Loops::padded_bytes, Loops::pad_tasks,
                              Loops::pad,       Loops::dot_step,     Loops::dot_rows};

extern const Path avx2_tile = {"avx2-tile",      kAvx2,      0,
                               false,            Loops::serves, tile_cost,
                               nullptr,          Loops::padded_bytes, Loops::pad_tasks,
                               Loops::pad,       Loops::tile_step,    Loops::tile_rows};

extern const Path avx2_skip = {"avx2-skip",      kAvx2,      0,
                               true,             Loops::serves, skip_cost,
                               nullptr,          Loops::panel_bytes, Loops::panel_tasks,
                               Loops::panel,     Loops::skip_step,   Loops::skip_rows};

}  // namespace zs
