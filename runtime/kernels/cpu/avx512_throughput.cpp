// Many tokens, weights in pairs of rows (throughput_layout.h): lanes over tokens, each kept weight
// broadcast. x is packed into panels of up to 128 tokens; a block of 64 columns of a panel stays in
// L1 while the rows of a block of W pass over it, and their sums stay in L2.
#include <algorithm>
#include <cstring>

#include "avx512_values.h"
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

using avx512::first_lanes;
using avx512::unroll;
using Layout = ThroughputLayout;

// Registers of 16 tokens in a panel; the sums of a pair of rows take twice as many.
constexpr int kMaxVectors = 8;

// The tokens of a call in registers of 16, and these in panels of about the same width.
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t m)
      : vectors((m + 15) / 16), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count; }
};

// Out of line it would pass 16 registers through memory.
ZS_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  const auto lo = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto hi = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  unroll<8>([&](auto i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<4>([&](auto i) {
    r[4 * i] = lo(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = hi(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = lo(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = hi(t[4 * i + 1], t[4 * i + 3]);
  });
  unroll<4>([&](auto i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  });
  unroll<4>([&](auto i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
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
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i half = _mm256_loadu_si256((const __m256i*)(values + i));
      _mm512_store_ps(buffer + i, _mm512_cvtph_ps(half));
    }
    return buffer;
  }
};

struct Bfloat16Pairs {
  using Element = uint16_t;
  static const float* widen(const uint16_t* values, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i half = _mm256_loadu_si256((const __m256i*)(values + i));
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
      _mm512_store_ps(buffer + i, _mm512_castsi512_ps(bits));
    }
    return buffer;
  }
};

// Compilers would rather load x twice than keep it: loads are what limits this kernel.
inline __m512 in_register(__m512 v) {
#ifdef __GNUC__
  asm("" : "+v"(v));
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

// Adds the products of a run of pairs to `sums`, [kBlockRows + 1, 16 * vectors]; x is a block of
// columns, [columns, 16 * vectors]. Inlined into a larger loop nest, the innermost loops would lack
// registers.
template <int vectors, class Values>
ZS_NOINLINE Cursor<typename Values::Element> add_run(const Layout::Run run,
                                                     Cursor<typename Values::Element> at,
                                                     const float* x, float* sums) {
  constexpr size_t kStride = 16 * vectors;
  // Sums of a row for each vector: with few vectors, several hide the latency of an FMA.
  constexpr int kSums = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
  alignas(64) float buffer[kBuffer];
  const size_t shared = run.shared, single = run.single;
  for (const uint8_t* const last = at.row + 2 * run.pairs; at.row != last; at.row += 2) {
    float* const y_a = sums + at.row[0] * kStride;
    float* const y_b = sums + at.row[1] * kStride;
    const float* w = Values::widen(at.value, (int64_t)(2 * (shared + single)), buffer);
    at.value += 2 * (shared + single);

    __m512 a[kSums][vectors], b[kSums][vectors];
    unroll<vectors>([&](auto v) {
      a[0][v] = _mm512_load_ps(y_a + 16 * v);
      b[0][v] = _mm512_load_ps(y_b + 16 * v);
      unroll<kSums - 1>([&](auto s) {
        a[s + 1][v] = _mm512_setzero_ps();
        b[s + 1][v] = _mm512_setzero_ps();
      });
    });

    const auto add_shared = [&](size_t i, auto s) {
      const float* const x_ab = x + at.column[i] * kStride;
      const __m512 w_a = _mm512_set1_ps(w[2 * i]), w_b = _mm512_set1_ps(w[2 * i + 1]);
      unroll<vectors>([&](auto v) {
        const __m512 x_v = in_register(_mm512_load_ps(x_ab + 16 * v));
        a[s][v] = _mm512_fmadd_ps(w_a, x_v, a[s][v]);
        b[s][v] = _mm512_fmadd_ps(w_b, x_v, b[s][v]);
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
      const __m512 w_a = _mm512_set1_ps(w[2 * i]), w_b = _mm512_set1_ps(w[2 * i + 1]);
      unroll<vectors>([&](auto v) {
        a[s][v] = _mm512_fmadd_ps(w_a, _mm512_load_ps(x_a + 16 * v), a[s][v]);
      });
      unroll<vectors>([&](auto v) {
        b[s][v] = _mm512_fmadd_ps(w_b, _mm512_load_ps(x_b + 16 * v), b[s][v]);
      });
    };
    i = 0;
    for (; i + kSums <= single; i += kSums) unroll<kSums>([&](auto s) { add_single(i + s, s); });
    if constexpr (kSums > 1)
      for (; i < single; i++) add_single(i, std::integral_constant<int, 0>());
    at.column += 2 * single;

    unroll<vectors>([&](auto v) {
      unroll<kSums - 1>([&](auto s) {
        a[0][v] = _mm512_add_ps(a[0][v], a[s + 1][v]);
        b[0][v] = _mm512_add_ps(b[0][v], b[s + 1][v]);
      });
      _mm512_store_ps(y_a + 16 * v, a[0][v]);
      _mm512_store_ps(y_b + 16 * v, b[0][v]);
    });
  }
  return at;
}

// Writes the sums of `rows` rows and one register of tokens to y, with the bias.
void write_sums(const Call& c, const float* sums, int64_t stride, int64_t row, int64_t rows,
                int64_t token) {
  const int64_t tokens = std::min<int64_t>(16, c.m - token);
  const int64_t y_stride = c.weight.rows;
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 lanes = first_lanes(rows - r);
    __m512 block[16];
    unroll<16>([&](auto i) { block[i] = _mm512_load_ps(sums + (r + i) * stride); });
    transpose(block);
    const __m512 bias = c.bias ? _mm512_maskz_loadu_ps(lanes, c.bias + row + r)
                               : _mm512_setzero_ps();
    float* const y = c.y + token * y_stride + row + r;
    if (tokens == 16 && lanes == 0xffff) {
      unroll<16>([&](auto i) { _mm512_storeu_ps(y + i * y_stride, _mm512_add_ps(block[i], bias)); });
    } else {
      unroll<16>([&](auto i) {
        if (i < tokens)
          _mm512_mask_storeu_ps(y + i * y_stride, lanes, _mm512_add_ps(block[i], bias));
      });
    }
  }
}

// One block of rows of W and one panel of x.
template <int vectors, class Values>
void multiply_panel(const Call& c, int64_t row_block, int64_t first_vector, float* sums) {
  using Element = typename Values::Element;
  constexpr int64_t kStride = 16 * vectors;
  const Layout& layout = *(const Layout*)c.form;
  const int64_t row = row_block * Layout::kBlockRows;
  memset(sums, 0, sizeof(float) * (size_t)((Layout::kBlockRows + 1) * kStride));
  const float* x = (const float*)c.workspace + first_vector * 16 * c.weight.columns;
  for (int64_t i = 0; i < layout.column_blocks; i++, x += layout.block_columns * kStride) {
    const int64_t index = row_block * layout.column_blocks + i;
    const Layout::Block* const block = layout.blocks.data() + index;
    Cursor<Element> at = {layout.rows.data() + block->row, layout.columns.get() + block->column,
                          (const Element*)layout.values.get() + block->value};
    for (int64_t run = block->run; run < block[1].run; run++)
      at = add_run<vectors, Values>(layout.runs[(size_t)run], at, x, sums);
  }
  for (int v = 0; v < vectors; v++)
    write_sums(c, sums + 16 * v, kStride, row, std::min(Layout::kBlockRows, c.weight.rows - row),
               (first_vector + v) * 16);
}

template <class Values>
void rows_of(const Call& c, int64_t begin, int64_t end) {
  using Multiply = void (*)(const Call&, int64_t, int64_t, float*);
  static constexpr Multiply kMultiply[kMaxVectors] = {
      multiply_panel<1, Values>, multiply_panel<2, Values>, multiply_panel<3, Values>,
      multiply_panel<4, Values>, multiply_panel<5, Values>, multiply_panel<6, Values>,
      multiply_panel<7, Values>, multiply_panel<8, Values>};
  alignas(64) float sums[(Layout::kBlockRows + 1) * 16 * kMaxVectors];
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
int64_t block_words(const Weight& w) { return w.density < 0.15 ? 2 : 1; }

// Fitted to measurements of 0.1 to 0.6 kept and 8 to 512 tokens, cycles of a Sapphire Rapids.
double cost(const Weight& w, int64_t m) {
  const Panels panels(m);
  const double kept = (double)w.rows * (double)w.columns * w.density;
  const double row_passes = (double)w.rows * (double)w.words / (double)block_words(w);
  return (double)panels.count * (0.34 * kept + 12 * row_passes) +
         (double)panels.vectors * (0.57 * kept + 59 * (double)(w.rows + w.columns));
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
  return (size_t)(Panels(m).vectors * 16) * (size_t)w.columns * sizeof(float);
}

size_t workspace(const Weight& w, int64_t m) {
  return panel_bytes(w, m) + (size_t)prepare_tasks(w, m);
}

// Puts columns [k, end) of 16 tokens, of which `tokens` are there, into a panel. `zeros` becomes NaN
// in a lane that has met a number that is not finite.
ZS_INLINE void pack(const float* x, int64_t columns, int64_t tokens, int64_t k, int64_t end,
                    float* out, int64_t stride, __m512* zeros) {
  for (; k < end; k += 16) {
    __m512 block[16];
    if (tokens >= 16 && k + 16 <= end) {
      unroll<16>([&](auto i) { block[i] = _mm512_loadu_ps(x + i * columns + k); });
    } else {
      const __mmask16 lanes = first_lanes(end - k);
      unroll<16>([&](auto i) {
        block[i] = i < tokens ? _mm512_maskz_loadu_ps(lanes, x + i * columns + k)
                              : _mm512_setzero_ps();
      });
    }
    // An infinity or a NaN times 0 is NaN, and so is every sum with one.
    unroll<16>([&](auto i) {
      zeros[i % 4] = _mm512_fmadd_ps(block[i], _mm512_setzero_ps(), zeros[i % 4]);
    });
    transpose(block);
    if (k + 16 <= end) {
      unroll<16>([&](auto i) { _mm512_store_ps(out + (k + i) * stride, block[i]); });
    } else {
      unroll<16>([&](auto i) {
        if (k + i < end) _mm512_store_ps(out + (k + i) * stride, block[i]);
      });
    }
  }
}

void prepare(const Call& c, int64_t task) {
  const int64_t columns = c.weight.columns, begin = task * kTaskColumns;
  const int64_t end = std::min(columns, begin + kTaskColumns);
  const Panels panels(c.m);
  __m512 zeros[4];
  unroll<4>([&](auto i) { zeros[i] = _mm512_setzero_ps(); });
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t first = panels.begin(p), stride = 16 * (panels.begin(p + 1) - first);
    for (int64_t token = 0; token < stride; token += 16)
      pack(c.x + (16 * first + token) * columns, columns, c.m - 16 * first - token, begin, end,
           (float*)c.workspace + 16 * first * columns + token, stride, zeros);
  }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(zeros[0], zeros[1]),
                                   _mm512_add_ps(zeros[2], zeros[3]));
  char* const finite = c.workspace + panel_bytes(c.weight, c.m);
  finite[task] = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0;
}

bool finite(const Call& c) {
  const char* const finite = c.workspace + panel_bytes(c.weight, c.m);
  const int64_t tasks = prepare_tasks(c.weight, c.m);
  return std::all_of(finite, finite + tasks, [](char task) { return task != 0; });
}

int64_t row_step(const Weight&, int64_t) { return Layout::kBlockRows; }

}  // namespace

extern const Path avx512_throughput = {"avx512-throughput", kAvx512,       1,       true,
                                       serves,              cost,          make_form, workspace,
                                       prepare_tasks,       prepare,       row_step,  rows,
                                       finite};

}  // namespace zs
