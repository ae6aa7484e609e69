// One or two rows of x and a very sparse W: column numbers instead of bits, and x is gathered.
//
// A word of bitmask costs the dot kernel the same however few of its bits are set; this one pays
// for kept weights only, with 2 more bytes for each of them.
#include <algorithm>
#include <vector>

#include "avx512_values.h"

namespace zs {
namespace {

using namespace avx512;

constexpr double kMaxDensity = 0.2;  // keeps the form below 0.4 bytes for a weight
constexpr int64_t kMaxColumns = 65536;
constexpr int kPadding = 64;             // elements behind the columns, for the stores of make_form
constexpr int64_t kPrefetchBytes = 1024;

struct Columns : Form {
  std::vector<uint16_t> columns;  // of each kept weight
  size_t bytes() const override { return columns.size() * sizeof(uint16_t); }
};

bool serves(const Weight& w, int64_t m, int32_t) {
  return m <= 2 && w.type != ZS_INT8 && w.density < kMaxDensity && w.columns <= kMaxColumns;
}

std::unique_ptr<Form> make_form(const Weight& w) {
  std::unique_ptr<Columns> form(new Columns);
  form->columns.resize((size_t)w.row_offsets[w.rows] + kPadding);
  uint16_t* out = form->columns.data();
  alignas(64) uint16_t first[32];
  for (int i = 0; i < 32; i++) first[i] = (uint16_t)i;
  const __m512i lanes = _mm512_load_si512(first);
  for (int64_t n = 0; n < w.rows; n++)
    for (int64_t i = 0; i < w.words; i++) {
      const uint64_t word = w.bitmask[n * w.words + i];
      const uint32_t half[2] = {(uint32_t)word, (uint32_t)(word >> 32)};
      for (int h = 0; h < 2; h++) {
        const __m512i columns =
            _mm512_add_epi16(lanes, _mm512_set1_epi16((short)(uint16_t)(i * 64 + h * 32)));
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(half[h], columns));
        out += count_bits(half[h]);
      }
    }
  return form;
}

int64_t row_step(const Weight&, int64_t) { return 1; }

// Up to 16 values: those of the lanes.
inline __m512 load(const float* p, __mmask16 lanes, Float32Values) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
inline __m512 load(const uint16_t* p, __mmask16 lanes, Float16Values) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
inline __m512 load(const uint16_t* p, __mmask16 lanes, Bfloat16Values) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <class Values, int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end) {
  const Weight& w = c.weight;
  const auto* values = (const typename Values::Element*)w.values;
  const uint16_t* columns = ((const Columns*)c.form)->columns.data();
  for (int64_t n = begin; n < end; n++) {
    constexpr int kChains = 4;  // independent sums, so that additions do not wait for each other
    __m512 sums[kChains][tokens];
    unroll<kChains * tokens>([&](auto i) { sums[i / tokens][i % tokens] = _mm512_setzero_ps(); });
    int64_t i = w.row_offsets[n];
    const int64_t row_end = w.row_offsets[n + 1];
    const auto add = [&](auto chain, int64_t at, __mmask16 lanes) {
      const __m512i index =
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, columns + at));
      const __m512 v = load(values + at, lanes, Values());
      unroll<tokens>([&](auto t) {
        const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index,
                                                  c.x + t * w.columns, sizeof(float));
        sums[chain][t] = _mm512_fmadd_ps(v, x, sums[chain][t]);
      });
    };
    for (; i + 16 * kChains <= row_end; i += 16 * kChains) {
      // Rows lie one after the other: straight ahead is always right.
      prefetch_lines((uintptr_t)(values + i) + kPrefetchBytes, (int)sizeof(*values));
      prefetch_lines((uintptr_t)(columns + i) + kPrefetchBytes, (int)sizeof(*columns));
      unroll<kChains>([&](auto chain) { add(chain, i + 16 * chain, (__mmask16)0xffff); });
    }
    for (; i < row_end; i += 16)
      add(std::integral_constant<int, 0>(), i, first_lanes(row_end - i));
    unroll<tokens>([&](auto t) {
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0][t], sums[1][t]),
                                       _mm512_add_ps(sums[2][t], sums[3][t]));
      c.y[t * w.rows + n] = _mm512_reduce_add_ps(sum) + (c.bias ? c.bias[n] : 0.0f);
    });
  }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  const auto run = [&](auto values) {
    using Values = decltype(values);
    if (c.m == 1) return all_rows<Values, 1>(c, begin, end);
    return all_rows<Values, 2>(c, begin, end);
  };
  if (c.weight.type == ZS_FLOAT32) return run(Float32Values());
  if (c.weight.type == ZS_FLOAT16) return run(Float16Values());
  run(Bfloat16Values());
}

// Fitted to one thread of a Xeon with AVX-512 at 2.2 GHz: 4096 x 4096 weights of density 0.1 in
// turn, larger than the caches, 1 and 2 tokens. Other work was running on the machine.
double cost(const Weight& w, int64_t m) {
  const double kept = (double)w.row_offsets[w.rows];
  const double compute = kept * (0.1 + 0.85 * (double)m);
  const double memory = kept * (double)(value_bytes(w.type) + sizeof(uint16_t)) / kBytesPerCycle;
  return std::max(compute, memory) + 0.5 * std::min(compute, memory) + 40.0 * (double)w.rows;
}

}  // namespace

extern const Path avx512_gather = {
    "avx512-gather", kAvx512,   0,       true /* skips zeros */,
    serves,          cost,      make_form, nullptr,
    nullptr,         nullptr,   row_step,  rows};

}  // namespace zs
