// The AVX2 kernels for float activations; simd_loops.h holds their loops.
#include <immintrin.h>

#include "avx2_values.h"
#include "simd_loops.h"

namespace zs {
namespace {

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

  static Vector expand(Vector values, uint32_t bits) { return avx2::expand8(values, bits); }

  static float sum(Vector v) { return avx2::sum_lanes(v); }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }

  static int count(uint64_t bits) { return (int)_mm_popcnt_u64(bits); }
  static int first(uint64_t bits) { return (int)_tzcnt_u64(bits); }
  static void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }
};

using Loops = SimdLoops<Avx2>;

// As those of the other AVX2 kernels: cycles of a Zen 3 beside other work.
double tile_cost(const Weight& w, int64_t m) {
  return avx2::elements(w) * (0.66 + (double)m * 0.11);
}

double skip_cost(const Weight& w, int64_t m) {
  const double panels = (double)((m + Loops::kPanelTokens - 1) / Loops::kPanelTokens);
  return avx2::elements(w) * panels * (0.75 + 5.1 * w.density) +
         (double)w.columns * (double)m * 2;
}

}  // namespace

extern const Path avx2_tile = {"avx2-tile",      kAvx2,      0,
                               false,            Loops::serves, tile_cost,
                               nullptr,          Loops::padded_bytes, Loops::pad_tasks,
                               Loops::pad,       Loops::tile_step,    Loops::tile_rows};

extern const Path avx2_skip = {"avx2-skip",      kAvx2,      0,
                               true,             Loops::serves, skip_cost,
                               nullptr,          Loops::panel_bytes, Loops::panel_tasks,
                               Loops::panel,     Loops::skip_step,   Loops::skip_rows};

}  // namespace zs
