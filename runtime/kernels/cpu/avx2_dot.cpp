// Few rows of x: rows of W side by side, expanded in registers and multiplied with x from cache.
//
// AVX2 has no expanding load. Eight bits of the bitmask look up which of the next values goes to
// which lane; values of 16 bits take one byte shuffle for it, which makes the zeros too.
#include <algorithm>
#include <cstring>

#include "avx2_values.h"

namespace zs {
namespace {

using namespace avx2;

constexpr int kMaxTokens = 4;
constexpr int64_t kPrefetchBytes = 2048;  // ahead of each row: hides the latency of memory

bool serves(const Weight& w, int64_t, int32_t level) { return !(w.type == ZS_INT8 && level == 4); }

// The rows of x in the workspace, padded with zeros to whole words of the bitmask. For bfloat16,
// every 16 columns are 8 even ones, then 8 odd ones.
size_t workspace(const Weight& w, int64_t m) { return (size_t)(m * w.words) * 256; }

int64_t prepare_tasks(const Weight&, int64_t m) { return m; }

void prepare(const Call& c, int64_t token) {
  const int64_t columns = c.weight.columns, padded = c.weight.words * 64;
  if (!padded) return;
  float* to = (float*)c.workspace + token * padded;
  memcpy(to, c.x + token * columns, (size_t)columns * sizeof(float));
  std::fill(to + columns, to + padded, 0.0f);
  if (c.weight.type != ZS_BFLOAT16) return;
  for (int64_t k = 0; k < padded; k += 16) {
    const __m256 low = _mm256_loadu_ps(to + k), high = _mm256_loadu_ps(to + k + 8);
    const auto in_order = [](__m256 v) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
    };
    _mm256_storeu_ps(to + k, in_order(_mm256_shuffle_ps(low, high, 0x88)));
    _mm256_storeu_ps(to + k + 8, in_order(_mm256_shuffle_ps(low, high, 0xdd)));
  }
}

// Each expands the next 16 columns of a row, of which `first` and `second` are the bits: it gives
// the register that x's first 8 floats are multiplied with, and that of its second 8.
struct Float32Values {
  using Element = float;
  static void expand(const float* low, const float* high, uint32_t first, uint32_t second,
                     __m256* v) {
    v[0] = expand8(_mm256_loadu_ps(low), first);
    v[1] = expand8(_mm256_loadu_ps(high), second);
  }
};

struct Float16Values {
  using Element = uint16_t;
  static void expand(const uint16_t* low, const uint16_t* high, uint32_t first, uint32_t second,
                     __m256* v) {
    v[0] = _mm256_cvtph_ps(expand8(_mm_loadu_si128((const __m128i*)low), first));
    v[1] = _mm256_cvtph_ps(expand8(_mm_loadu_si128((const __m128i*)high), second));
  }
};

struct Bfloat16Values {
  using Element = uint16_t;
  static void expand(const uint16_t* low, const uint16_t* high, uint32_t first, uint32_t second,
                     __m256* v) {
    const __m256i both = expand16(low, high, first, second);
    v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    v[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
  }
};

struct Int8Values {
  using Element = int8_t;
  static __m256 widen(const int8_t* values, uint32_t bits) {
    const __m128i lanes = _mm_loadl_epi64((const __m128i*)kByteLanes.of[bits]);
    const __m128i v = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values), lanes);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v));
  }
  static void expand(const int8_t* low, const int8_t* high, uint32_t first, uint32_t second,
                     __m256* v) {
    v[0] = widen(low, first);
    v[1] = widen(high, second);
  }
};

// Follows one row a fixed distance ahead; at its end it goes on in the row that is read next.
struct Lookahead {
  uintptr_t last;  // from here on, the distance leads beyond the row
  uintptr_t jump;  // from the end of the row to the next one

  const char* operator()(const void* p) const {
    const uintptr_t at = (uintptr_t)p;
    return (const char*)(at + kPrefetchBytes + (at >= last ? jump : 0));
  }
};

// What is known of the bits: nothing; every 16 columns keep 8; every 8 columns keep 4, as in 2:4.
enum Evenness { kUneven, kSixteens, kEights };

// `rows` rows of W from n on times `tokens` rows of x from m on.
template <class Values, Evenness even, int rows, int tokens>
void multiply(const Call& c, int64_t n, int64_t m) {
  using Element = typename Values::Element;
  const Weight& w = c.weight;
  const int64_t stride = w.words * 64;
  const float* x = (const float*)c.workspace + m * stride;
  const Element* value[rows];
  const uint8_t* bits[rows];
  Lookahead ahead[rows];
  __m256 sum[rows][tokens];
  const Element* const all = (const Element*)w.values;
  for (int r = 0; r < rows; r++) {
    const uintptr_t row_end = (uintptr_t)(all + w.row_offsets[n + r + 1]);
    const uintptr_t next = (uintptr_t)(all + w.row_offsets[std::min(n + r + rows, w.rows)]);
    ahead[r] = {row_end - kPrefetchBytes, next - row_end};
    value[r] = (const Element*)w.values + w.row_offsets[n + r];
    bits[r] = (const uint8_t*)(w.bitmask + (n + r) * w.words);
    for (int t = 0; t < tokens; t++) sum[r][t] = _mm256_setzero_ps();
  }
  // Lines of values that a word of the bitmask stands for.
  const int lines = (int)(w.density * 64 * sizeof(Element) / 64 + 0.9);
  const auto add_words = [&](int64_t begin, int64_t end, __m256 (*to)[tokens]) {
    for (int64_t word = begin; word < end; word++) {
      for (int r = 0; r < rows; r++) {
        const char* const address = ahead[r](value[r]);
        for (int line = 0; line < lines; line++)
          _mm_prefetch(address + 64 * line, _MM_HINT_T0);
      }
      ZS_UNROLL
      for (int i = 0; i < 4; i++) {
        const float* const at = x + word * 64 + i * 16;
        ZS_UNROLL
        for (int r = 0; r < rows; r++) {
          const uint32_t first = bits[r][word * 8 + 2 * i], second = bits[r][word * 8 + 2 * i + 1];
          const Element* const middle = value[r] + (even == kEights ? 4 : _mm_popcnt_u32(first));
          __m256 v[2];
          Values::expand(value[r], middle, first, second, v);
          value[r] = even != kUneven ? value[r] + 8 : middle + _mm_popcnt_u32(second);
          ZS_UNROLL
          for (int t = 0; t < tokens; t++) {
            to[r][t] = _mm256_fmadd_ps(v[0], _mm256_loadu_ps(at + t * stride), to[r][t]);
            to[r][t] = _mm256_fmadd_ps(v[1], _mm256_loadu_ps(at + t * stride + 8), to[r][t]);
          }
        }
      }
    }
  };
  if (!w.scales) {
    add_words(0, w.words, sum);
  } else {
    for (int64_t b = 0; b < w.blocks; b++) {
      __m256 part[rows][tokens];
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) part[r][t] = _mm256_setzero_ps();
      add_words(b * w.block_words, std::min(w.words, (b + 1) * w.block_words), part);
      for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_set1_ps(w.scales[(n + r) * w.blocks + b]);
        for (int t = 0; t < tokens; t++)
          sum[r][t] = _mm256_fmadd_ps(part[r][t], scale, sum[r][t]);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++)
      c.y[(m + t) * w.rows + n + r] = sum_lanes(sum[r][t]) + (c.bias ? c.bias[n + r] : 0.0f);
}

template <class Values, Evenness even, int tokens>
void all_rows(const Call& c, int64_t begin, int64_t end, int64_t m) {
  constexpr int rows = tokens == 1 ? 4 : 2;  // what fits into 16 registers
  int64_t n = begin;
  for (; n + rows <= end; n += rows) multiply<Values, even, rows, tokens>(c, n, m);
  for (; n < end; n++) multiply<Values, even, 1, tokens>(c, n, m);
}

template <class Values, Evenness even>
void all_tokens(const Call& c, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + kMaxTokens <= c.m; m += kMaxTokens) all_rows<Values, even, kMaxTokens>(c, begin, end, m);
  switch (c.m - m) {
    case 1: return all_rows<Values, even, 1>(c, begin, end, m);
    case 2: return all_rows<Values, even, 2>(c, begin, end, m);
    case 3: return all_rows<Values, even, 3>(c, begin, end, m);
  }
}

template <class Values>
void rows_of(const Call& c, int64_t begin, int64_t end) {
  if (c.weight.even_eights) return all_tokens<Values, kEights>(c, begin, end);
  if (c.weight.even) return all_tokens<Values, kSixteens>(c, begin, end);
  return all_tokens<Values, kUneven>(c, begin, end);
}

void rows(const Call& c, int64_t begin, int64_t end) {
  switch (c.weight.type) {
    case ZS_FLOAT32: return rows_of<Float32Values>(c, begin, end);
    case ZS_FLOAT16: return rows_of<Float16Values>(c, begin, end);
    case ZS_BFLOAT16: return rows_of<Bfloat16Values>(c, begin, end);
    case ZS_INT8: return rows_of<Int8Values>(c, begin, end);
  }
}

int64_t row_step(const Weight&, int64_t) { return 4; }

// Fitted to one thread of a Zen 3 beside other work, as all costs of the AVX2 kernels: compute to
// weights in cache, memory to 4096 x 4096 weights in turn, larger than the caches; 1 to 128 tokens.
double cost(const Weight& w, int64_t m) {
  const double groups = (double)((m + kMaxTokens - 1) / kMaxTokens);
  const double expansion = w.type == ZS_FLOAT32 ? 0.39 : w.type == ZS_BFLOAT16 ? 0.25 : 0.45;
  const double compute = elements(w) * (groups * expansion + 0.07 * (double)m);
  const double memory = stored_bytes(w) / kBytesPerCycle;
  return std::max(compute, memory) + 0.2 * std::min(compute, memory);
}

}  // namespace

extern const Path avx2_dot = {
    "avx2-dot",    kAvx2,   0,        false /* zeros are multiplied */,
    serves,        cost,    nullptr,  workspace,
    prepare_tasks, prepare, row_step, rows};

}  // namespace zs
