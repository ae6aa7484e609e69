// Many tokens, weights in pairs of rows (throughput_layout.h): lanes over tokens, each kept weight
// broadcast. x is packed into panels of up to 48 tokens; a block of columns of a panel stays in L1
// while the rows of a block of W pass over it, and their sums stay in L2.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "avx2_values.h"
#include "throughput_layout.h"

#ifdef _MSC_VER
#define ZS_INLINE __forceinline
#define ZS_NOINLINE __declspec(noinline)
#else
#define ZS_INLINE __attribute__((always_inline)) inline
#define ZS_NOINLINE __attribute__((noinline))
#endif

namespace zs {
namespace {

using Layout = ThroughputLayout;

// Calls body(0), body(1), ... with constants.
template <int... i, class Body>
ZS_INLINE void unroll_each(std::integer_sequence<int, i...>, Body&& body) {
  (void)std::initializer_list<int>{(body(std::integral_constant<int, i>()), 0)...};
}
template <int count, class Body>
ZS_INLINE void unroll(Body&& body) {
  unroll_each(std::make_integer_sequence<int, count>(), body);
}

// Registers of 8 tokens in a panel; the sums of a pair of rows take twice as many of the 16.
constexpr int kMaxVectors = 6;

// The tokens of a call in registers of 8, and these in panels of about the same width.
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t m)
      : vectors((m + 7) / 8), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count; }
};

// Out of line it would pass 8 registers through memory.
ZS_INLINE void transpose(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  unroll<4>([&](auto i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<2>([&](auto i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  });
  unroll<4>([&](auto i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  });
}

// The values of a pair as float32: `widen` may use the buffer, which holds kBuffer floats.
constexpr int64_t kBuffer = 2 * Layout::kMaxBlockColumns;

struct Float32Pairs {
  using Element = float;
  static const float* widen(const float* values, int64_t, float*) { return values; }
};

struct Float16Pairs {
  using Element = uint16_t;
  static const float* widen(const uint16_t* values, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; i += 8) {
      const __m128i half = _mm_loadu_si128((const __m128i*)(values + i));
      _mm256_store_ps(buffer + i, _mm256_cvtph_ps(half));
    }
    return buffer;
  }
};

struct Bfloat16Pairs {
  using Element = uint16_t;
  static const float* widen(const uint16_t* values, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; i += 8) {
      const __m128i half = _mm_loadu_si128((const __m128i*)(values + i));
      const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
      _mm256_store_ps(buffer + i, _mm256_castsi256_ps(bits));
    }
    return buffer;
  }
};

// Compilers would rather load x twice than keep it: loads are what limits this kernel.
inline __m256 in_register(__m256 v) {
#ifdef __GNUC__
  asm("" : "+x"(v));
#endif
  return v;
}

// Where a kernel is in the arrays of the layout.
template <class Element>
struct Cursor {
  const uint8_t* row;
  const uint8_t* column;
  const Element* value;
};

// Adds the products of a run of pairs to `sums`, [kBlockRows + 1, 8 * vectors]; x is a block of
// columns, [columns, 8 * vectors]. Inlined into a larger loop nest, the innermost loops would lack
// registers.
template <int vectors, class Values>
ZS_NOINLINE Cursor<typename Values::Element> add_run(const Layout::Run run,
                                                     Cursor<typename Values::Element> at,
                                                     const float* x, float* sums) {
  constexpr size_t kStride = 8 * vectors;
  // Sums of a row for each vector: with few vectors, several hide the latency of an FMA.
  constexpr int kSums = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
  alignas(32) float buffer[kBuffer];
  const size_t shared = run.shared, single = run.single;
  for (const uint8_t* const last = at.row + 2 * run.pairs; at.row != last; at.row += 2) {
    float* const y_a = sums + at.row[0] * kStride;
    float* const y_b = sums + at.row[1] * kStride;
    const float* w = Values::widen(at.value, (int64_t)(2 * (shared + single)), buffer);
    at.value += 2 * (shared + single);

    __m256 a[kSums][vectors], b[kSums][vectors];
    unroll<vectors>([&](auto v) {
      a[0][v] = _mm256_load_ps(y_a + 8 * v);
      b[0][v] = _mm256_load_ps(y_b + 8 * v);
      unroll<kSums - 1>([&](auto s) {
        a[s + 1][v] = _mm256_setzero_ps();
        b[s + 1][v] = _mm256_setzero_ps();
      });
    });

    const auto add_shared = [&](size_t i, auto s) {
      const float* const x_ab = x + at.column[i] * kStride;
      const __m256 w_a = _mm256_set1_ps(w[2 * i]), w_b = _mm256_set1_ps(w[2 * i + 1]);
      unroll<vectors>([&](auto v) {
        const __m256 x_v = in_register(_mm256_load_ps(x_ab + 8 * v));
        a[s][v] = _mm256_fmadd_ps(w_a, x_v, a[s][v]);
        b[s][v] = _mm256_fmadd_ps(w_b, x_v, b[s][v]);
      });
    };
    size_t i = 0;
    for (; i + kSums <= shared; i += kSums) unroll<kSums>([&](auto s) { add_shared(i + s, s); });
    if constexpr (kSums > 1)
      for (; i < shared; i++) add_shared(i, std::integral_constant<int, 0>());
    at.column += shared;
    w += 2 * shared;

    const auto add_single = [&](size_t i, auto s) {
      const float* const x_a = x + at.column[2 * i] * kStride;
      const float* const x_b = x + at.column[2 * i + 1] * kStride;
      const __m256 w_a = _mm256_set1_ps(w[2 * i]), w_b = _mm256_set1_ps(w[2 * i + 1]);
      unroll<vectors>([&](auto v) {
        a[s][v] = _mm256_fmadd_ps(w_a, _mm256_load_ps(x_a + 8 * v), a[s][v]);
      });
      unroll<vectors>([&](auto v) {
        b[s][v] = _mm256_fmadd_ps(w_b, _mm256_load_ps(x_b + 8 * v), b[s][v]);
      });
    };
    i = 0;
    for (; i + kSums <= single; i += kSums) unroll<kSums>([&](auto s) { add_single(i + s, s); });
    if constexpr (kSums > 1)
      for (; i < single; i++) add_single(i, std::integral_constant<int, 0>());
    at.column += 2 * single;

    unroll<vectors>([&](auto v) {
      unroll<kSums - 1>([&](auto s) {
        a[0][v] = _mm256_add_ps(a[0][v], a[s + 1][v]);
        b[0][v] = _mm256_add_ps(b[0][v], b[s + 1][v]);
      });
      _mm256_store_ps(y_a + 8 * v, a[0][v]);
      _mm256_store_ps(y_b + 8 * v, b[0][v]);
    });
  }
  return at;
}

// Writes the sums of `rows` rows and one register of tokens to y, with the bias.
void write_sums(const Call& c, const float* sums, int64_t stride, int64_t row, int64_t rows,
                int64_t token) {
  const int64_t tokens = std::min<int64_t>(8, c.m - token);
  const int64_t y_stride = c.weight.rows;
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    __m256 block[8];
    unroll<8>([&](auto i) { block[i] = _mm256_load_ps(sums + (r + i) * stride); });
    transpose(block);
    const __m256 bias = c.bias ? _mm256_loadu_ps(c.bias + row + r) : _mm256_setzero_ps();
    float* const y = c.y + token * y_stride + row + r;
    unroll<8>([&](auto i) {
      if (i < tokens) _mm256_storeu_ps(y + i * y_stride, _mm256_add_ps(block[i], bias));
    });
  }
  for (; r < rows; r++)
    for (int64_t i = 0; i < tokens; i++)
      c.y[(token + i) * y_stride + row + r] = sums[r * stride + i] + (c.bias ? c.bias[row + r] : 0.0f);
}

// One block of rows of W and one panel of x.
template <int vectors, class Values>
void multiply_panel(const Call& c, int64_t row_block, int64_t first_vector, float* sums) {
  using Element = typename Values::Element;
  constexpr int64_t kStride = 8 * vectors;
  const Layout& layout = *(const Layout*)c.form;
  const int64_t row = row_block * Layout::kBlockRows;
  memset(sums, 0, sizeof(float) * (size_t)((Layout::kBlockRows + 1) * kStride));
  const float* x = (const float*)c.workspace + first_vector * 8 * c.weight.columns;
  for (int64_t i = 0; i < layout.column_blocks; i++, x += layout.block_columns * kStride) {
    const int64_t index = row_block * layout.column_blocks + i;
    const Layout::Block* const block = layout.blocks.data() + index;
    Cursor<Element> at = {layout.rows.data() + block->row, layout.columns.get() + block->column,
                          (const Element*)layout.values.get() + block->value};
    for (int64_t run = block->run; run < block[1].run; run++)
      at = add_run<vectors, Values>(layout.runs[(size_t)run], at, x, sums);
  }
  for (int v = 0; v < vectors; v++)
    write_sums(c, sums + 8 * v, kStride, row, std::min(Layout::kBlockRows, c.weight.rows - row),
               (first_vector + v) * 8);
}

template <class Values>
void rows_of(const Call& c, int64_t begin, int64_t end) {
  using Multiply = void (*)(const Call&, int64_t, int64_t, float*);
  static constexpr Multiply kMultiply[kMaxVectors] = {
      multiply_panel<1, Values>, multiply_panel<2, Values>, multiply_panel<3, Values>,
      multiply_panel<4, Values>, multiply_panel<5, Values>, multiply_panel<6, Values>};
  alignas(64) float sums[(Layout::kBlockRows + 1) * 8 * kMaxVectors];
  const Panels panels(c.m);
  for (int64_t row = begin; row < end; row += Layout::kBlockRows)
    for (int64_t p = 0; p < panels.count; p++) {
      const int64_t first = panels.begin(p);
      kMultiply[panels.begin(p + 1) - first - 1](c, row / Layout::kBlockRows, first, sums);
    }
}

void rows(const Call& c, int64_t begin, int64_t end) {
  switch (c.weight.type) {
    case ZS_FLOAT32: return rows_of<Float32Pairs>(c, begin, end);
    case ZS_FLOAT16: return rows_of<Float16Pairs>(c, begin, end);
    default: return rows_of<Bfloat16Pairs>(c, begin, end);
  }
}

bool serves(const Weight& w, int64_t, int32_t) { return w.type != ZS_INT8; }

// With few weights in a block, adding to the sums in memory is what takes the time; with many, x
// had better stay in L1.
int64_t block_words(const Weight& w) { return w.density < 0.3 ? 2 : 1; }

// Fitted to 0.1 to 0.5 kept and 4 to 128 tokens, cycles of a Zen 3 beside other work.
double cost(const Weight& w, int64_t m) {
  const Panels panels(m);
  const double kept = (double)w.row_offsets[w.rows];
  const double row_passes = (double)w.rows * (double)w.words / (double)block_words(w);
  return (double)panels.count * (0.84 * kept + 9 * row_passes) +
         (double)panels.vectors * (0.66 * kept + 30 * (double)(w.rows + w.columns));
}

std::unique_ptr<Form> make_form(const Weight& w) {
  return make_throughput_layout(w, block_words(w));
}

constexpr int64_t kTaskColumns = 256;

int64_t prepare_tasks(const Weight& w, int64_t) {
  return (w.columns + kTaskColumns - 1) / kTaskColumns;
}

// The workspace holds x, panel by panel: [columns, tokens of the panel]; then, for each task of
// `prepare`, whether its part of x is finite.
size_t panel_bytes(const Weight& w, int64_t m) {
  return (size_t)(Panels(m).vectors * 8) * (size_t)w.columns * sizeof(float);
}

size_t workspace(const Weight& w, int64_t m) {
  return panel_bytes(w, m) + (size_t)prepare_tasks(w, m);
}

// Puts columns [k, end) of 8 tokens, of which `tokens` are there, into a panel. `zeros` becomes NaN in
// a lane that has met a number that is not finite.
ZS_INLINE void pack(const float* x, int64_t columns, int64_t tokens, int64_t k, int64_t end,
                    float* out, int64_t stride, __m256* zeros) {
  for (; k < end; k += 8) {
    __m256 block[8];
    const int64_t count = std::min<int64_t>(8, end - k);
    if (tokens >= 8 && count == 8) {
      unroll<8>([&](auto i) { block[i] = _mm256_loadu_ps(x + i * columns + k); });
    } else {
      alignas(32) float part[8][8] = {};
      for (int64_t i = 0; i < std::min<int64_t>(8, tokens); i++)
        memcpy(part[i], x + i * columns + k, (size_t)count * sizeof(float));
      unroll<8>([&](auto i) { block[i] = _mm256_load_ps(part[i]); });
    }
    // An infinity or a NaN times 0 is NaN, and so is every sum with one.
    unroll<8>([&](auto i) {
      zeros[i % 4] = _mm256_fmadd_ps(block[i], _mm256_setzero_ps(), zeros[i % 4]);
    });
    transpose(block);
    unroll<8>([&](auto i) {
      if (i < count) _mm256_store_ps(out + (k + i) * stride, block[i]);
    });
  }
}

void prepare(const Call& c, int64_t task) {
  const int64_t columns = c.weight.columns, begin = task * kTaskColumns;
  const int64_t end = std::min(columns, begin + kTaskColumns);
  const Panels panels(c.m);
  __m256 zeros[4];
  unroll<4>([&](auto i) { zeros[i] = _mm256_setzero_ps(); });
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t first = panels.begin(p), stride = 8 * (panels.begin(p + 1) - first);
    for (int64_t token = 0; token < stride; token += 8)
      pack(c.x + (8 * first + token) * columns, columns, c.m - 8 * first - token, begin, end,
           (float*)c.workspace + 8 * first * columns + token, stride, zeros);
  }
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(zeros[0], zeros[1]),
                                   _mm256_add_ps(zeros[2], zeros[3]));
  char* const finite = c.workspace + panel_bytes(c.weight, c.m);
  finite[task] = _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) == 0;
}

bool finite(const Call& c) {
  const char* const finite = c.workspace + panel_bytes(c.weight, c.m);
  const int64_t tasks = prepare_tasks(c.weight, c.m);
  return std::all_of(finite, finite + tasks, [](char task) { return task != 0; });
}

int64_t row_step(const Weight&, int64_t) { return Layout::kBlockRows; }

}  // namespace

extern const Path avx2_throughput = {"avx2-throughput", kAvx2,       1,       true,
                                       serves,              cost,          make_form, workspace,
                                       prepare_tasks,       prepare,       row_step,  rows,
                                       finite};

}  // namespace zs
