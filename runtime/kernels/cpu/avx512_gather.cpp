// One or two rows of x and a very sparse W: column numbers instead of bits, and x is gathered.
//
// A word of bitmask costs the dot kernel the same however few of its bits are set; this one pays
// for kept weights only, with a little more than a byte for each of them.
#include <algorithm>
#include <vector>

#include "avx512_values.h"

namespace zs {
namespace {

using namespace avx512;

constexpr double kMaxDensity = 0.2;  // keeps the form below 0.25 bytes for a weight
constexpr int64_t kMaxColumns = (int64_t)1 << 24;
constexpr int64_t kPadding = 64;  // elements behind the last, which whole registers may read
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kLanes = 16;

// The kept weights of a row in groups of up to 16 whose columns lie within 256 of the first: one
// byte for each column, and 4 for a group.
struct Columns : Form {
  std::vector<uint8_t> distances;      // of each kept weight from the first column of its group
  std::vector<uint32_t> groups;        // first column * 256 + number of weights
  std::vector<int64_t> group_offsets;  // [rows + 1]
  size_t bytes() const override {
    return distances.size() + groups.size() * sizeof(uint32_t) +
           group_offsets.size() * sizeof(int64_t);
  }
};

bool serves(const Weight& w, int64_t m, int32_t) {
  return m <= 2 && w.type != ZS_INT8 && w.density < kMaxDensity && w.columns <= kMaxColumns;
}

std::unique_ptr<Form> make_form(const Weight& w) {
  std::unique_ptr<Columns> form(new Columns);
  const int64_t kept = w.row_offsets[w.rows];
  form->distances.resize((size_t)(kept + kPadding));
  form->groups.reserve((size_t)(kept / kLanes + w.rows));
  form->group_offsets.reserve((size_t)w.rows + 1);
  uint8_t* out = form->distances.data();
  for (int64_t n = 0; n < w.rows; n++) {
    form->group_offsets.push_back((int64_t)form->groups.size());
    int64_t first = 0, count = 0;
    for (int64_t i = 0; i < w.words; i++)
      for (uint64_t left = w.bitmask[n * w.words + i]; left; left &= left - 1) {
        const int64_t column = i * 64 + (int64_t)_tzcnt_u64(left);
        if (count == kLanes || (count && column - first > 255)) {
          form->groups.push_back((uint32_t)(first << 8 | count));
          count = 0;
        }
        if (count++ == 0) first = column;
        *out++ = (uint8_t)(column - first);
      }
    if (count) form->groups.push_back((uint32_t)(first << 8 | count));
  }
  form->group_offsets.push_back((int64_t)form->groups.size());
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
  const Columns& form = *(const Columns*)c.form;
  for (int64_t n = begin; n < end; n++) {
    constexpr int kChains = 4;  // independent sums, so that additions do not wait for each other
    __m512 sums[kChains][tokens];
    unroll<kChains * tokens>([&](auto i) { sums[i / tokens][i % tokens] = _mm512_setzero_ps(); });
    const auto* value = (const typename Values::Element*)w.values + w.row_offsets[n];
    const uint8_t* distance = form.distances.data() + w.row_offsets[n];
    const uint32_t* group = form.groups.data() + form.group_offsets[n];
    const uint32_t* const last = form.groups.data() + form.group_offsets[n + 1];
    const auto add = [&](auto chain) {
      const uint32_t first = *group >> 8, count = *group & 255;
      const __mmask16 lanes = (__mmask16)((1u << count) - 1);
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)distance));
      const __m512 v = load(value, lanes, Values());
      unroll<tokens>([&](auto t) {
        const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index,
                                                  c.x + t * w.columns + first, sizeof(float));
        sums[chain][t] = _mm512_fmadd_ps(v, x, sums[chain][t]);
      });
      group++;
      value += count;
      distance += count;
    };
    for (; group + kChains <= last;) {
      // Rows lie one after the other: straight ahead is always right.
      prefetch_lines((uintptr_t)value + kPrefetchBytes, (int)sizeof(*value));
      prefetch_lines((uintptr_t)distance + kPrefetchBytes, 1);
      unroll<kChains>([&](auto chain) { add(chain); });
    }
    while (group != last) add(std::integral_constant<int, 0>());
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
  const double memory = kept * ((double)value_bytes(w.type) + 1.25) / kBytesPerCycle;
  return std::max(compute, memory) + 0.5 * std::min(compute, memory) + 40.0 * (double)w.rows;
}

}  // namespace

extern const Path avx512_gather = {
    "avx512-gather", kAvx512,   0,       true /* skips zeros */,
    serves,          cost,      make_form, nullptr,
    nullptr,         nullptr,   row_step,  rows};

}  // namespace zs
