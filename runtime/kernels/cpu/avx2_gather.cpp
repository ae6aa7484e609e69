// Few rows of x and a very sparse W: column numbers instead of bits, and x is gathered.
//
// The dot kernel pays for every byte of the bitmask, however few of its bits are set; this one pays
// for kept weights only, with two bytes of memory for each. Registers are put together from single
// loads: on many processors the gathering instruction of AVX2 is slower than that.
#include <algorithm>
#include <vector>

#include "avx2_values.h"

namespace zs {
namespace {

using namespace avx2;

constexpr double kMaxDensity = 0.2;  // keeps the form below 0.4 bytes for a weight
constexpr int64_t kMaxColumns = (int64_t)1 << 16;
constexpr int64_t kMaxM = 2;
constexpr int64_t kLanes = 8, kPrefetchBytes = 2048;

struct Columns : Form {
  std::vector<uint16_t> of;  // each kept weight
  size_t bytes() const override { return of.size() * sizeof(uint16_t); }
};

bool serves(const Weight& w, int64_t m, int32_t) {
  return m <= kMaxM && w.type != ZS_INT8 && w.density < kMaxDensity && w.columns <= kMaxColumns;
}

std::unique_ptr<Form> make_form(const Weight& w) {
  std::unique_ptr<Columns> form(new Columns);
  form->of.resize((size_t)w.row_offsets[w.rows]);
  uint16_t* out = form->of.data();
  for (int64_t n = 0; n < w.rows; n++)
    for (int64_t i = 0; i < w.words; i++)
      for (uint64_t left = w.bitmask[n * w.words + i]; left; left &= left - 1)
        *out++ = (uint16_t)(i * 64 + (int64_t)_tzcnt_u64(left));
  return form;
}

int64_t row_step(const Weight&, int64_t) { return 1; }

struct Float16Values {
  static __m256 load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
};
struct Bfloat16Values {
  static __m256 load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};
struct Float32Values {
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
};

inline __m256 gather(const float* x, const uint16_t* at) {
  return _mm256_setr_ps(x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]],
                        x[at[7]]);
}

template <class Values, class Element, int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  const uint16_t* const columns = ((const Columns*)c.form)->of.data();
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t n = begin; n < end; n++) {
    int64_t i = w.row_offsets[n];
    const int64_t last = w.row_offsets[n + 1];
    const Element* const values = (const Element*)w.values;
    constexpr int kChains = 2;  // independent sums, so that additions do not wait for each other
    __m256 sums[kChains][tokens];
    for (int chain = 0; chain < kChains; chain++)
      for (int t = 0; t < tokens; t++) sums[chain][t] = _mm256_setzero_ps();
    for (; i + kChains * kLanes <= last; i += kChains * kLanes) {
      // Rows lie one after the other: straight ahead is always right.
      _mm_prefetch((const char*)(values + i) + kPrefetchBytes, _MM_HINT_T0);
      _mm_prefetch((const char*)(columns + i) + kPrefetchBytes, _MM_HINT_T0);
      ZS_UNROLL
      for (int chain = 0; chain < kChains; chain++) {
        const __m256 v = Values::load(values + i + chain * kLanes);
        for (int t = 0; t < tokens; t++)
          sums[chain][t] = _mm256_fmadd_ps(
              v, gather(c.x + t * w.columns, columns + i + chain * kLanes), sums[chain][t]);
      }
    }
    for (; i < last; i += kLanes) {
      // Values and columns of the next row, or none at all, follow those that are left.
      const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(last - i)), places);
      const __m256 v = _mm256_and_ps(Values::load(values + i), _mm256_castsi256_ps(kept));
      uint16_t at[kLanes] = {};
      for (int64_t j = 0; j < kLanes && i + j < last; j++) at[j] = columns[i + j];
      for (int t = 0; t < tokens; t++)
        sums[0][t] = _mm256_fmadd_ps(
            v, _mm256_and_ps(gather(c.x + t * w.columns, at), _mm256_castsi256_ps(kept)),
            sums[0][t]);
    }
    for (int t = 0; t < tokens; t++)
      c.y[t * w.rows + n] =
          sum_lanes(_mm256_add_ps(sums[0][t], sums[1][t])) + (c.bias ? c.bias[n] : 0.0f);
  }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const auto run = [&](auto values, auto element) {
    using Values = decltype(values);
    using Element = decltype(element);
    if (c.m == 1) return all_rows<Values, Element, 1>(c, begin, end);
    return all_rows<Values, Element, 2>(c, begin, end);
  };
  if (c.weight.type == ZS_FLOAT32) return run(Float32Values(), float());
  if (c.weight.type == ZS_FLOAT16) return run(Float16Values(), uint16_t());
  run(Bfloat16Values(), uint16_t());
}

// As that of the dot kernel.
double cost(const Weight& w, int64_t m) {
  const double kept = (double)w.row_offsets[w.rows];
  const double compute = kept * (0.3 + 1.2 * (double)m);
  const double memory = kept * ((double)value_bytes(w.type) + 2) / kBytesPerCycle;
  return std::max(compute, memory) + 0.1 * std::min(compute, memory) + 30.0 * (double)w.rows;
}

}  // namespace

extern const Path avx2_gather = {
    "avx2-gather", kAvx2, 0,         true /* skips zeros */,
    serves,        cost,  make_form, nullptr,
    nullptr,       nullptr, row_step, rows};

}  // namespace zs
