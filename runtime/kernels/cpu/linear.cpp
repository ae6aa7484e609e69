// zs_linear: checks a weight, makes the forms that its kernels want, and runs them.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "path.h"

namespace zs {
extern const Path portable_dot;
extern const Path portable_int8;

namespace {

struct Served {
  const Path* path;
  std::unique_ptr<Form> form;
};

int32_t fail(char* message, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, ZS_MESSAGE_SIZE, format, arguments);
  va_end(arguments);
  return 1;
}

int64_t count_bits(uint64_t word) {
#ifdef _MSC_VER
  word -= word >> 1 & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
  return (int64_t)(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
#else
  return __builtin_popcountll(word);
#endif
}

#define LL(x) ((long long)(x))

// Every number that a kernel will trust is checked here, once.
int32_t check(const zs_weight& w, char* message) {
  if (w.rows < 0 || w.columns < 0)
    return fail(message, "the weight has %lld rows and %lld columns", LL(w.rows), LL(w.columns));
  const int64_t limit = (int64_t)1 << 40;  // keeps every product below within int64
  if (w.rows > limit || w.columns > limit || (w.columns && w.rows > ((int64_t)1 << 46) / w.columns))
    return fail(message, "a weight of %lld x %lld is too large", LL(w.rows), LL(w.columns));
  if (w.value_type < ZS_FLOAT32 || w.value_type > ZS_INT8)
    return fail(message, "unknown value type %d", (int)w.value_type);
  const int64_t words = (w.columns + 63) / 64;
  if (w.bitmask_count != w.rows * words)
    return fail(message, "the bitmask has %lld words, %lld rows of %lld columns need %lld",
                LL(w.bitmask_count), LL(w.rows), LL(w.columns), LL(w.rows * words));
  if (w.row_offsets_count != w.rows + 1)
    return fail(message, "there are %lld row offsets, %lld rows need %lld", LL(w.row_offsets_count),
                LL(w.rows), LL(w.rows + 1));
  if (!w.row_offsets || (w.bitmask_count && !w.bitmask) || !w.values)
    return fail(message, "an array of the weight is missing");
  if (((uintptr_t)w.bitmask | (uintptr_t)w.row_offsets) % 8 ||
      (uintptr_t)w.values % value_bytes((zs_value_type)w.value_type) || (uintptr_t)w.scales % 4)
    return fail(message, "an array of the weight is not aligned to its elements");
  if (w.row_offsets[0] != 0)
    return fail(message, "row_offsets[0] is %lld, not 0", LL(w.row_offsets[0]));
  const uint64_t beyond = w.columns % 64 ? ~(uint64_t)0 << w.columns % 64 : 0;
  for (int64_t n = 0; n < w.rows; n++) {
    const uint64_t* bits = w.bitmask + n * words;
    int64_t kept = 0;
    for (int64_t i = 0; i < words; i++) kept += count_bits(bits[i]);
    if (words && (bits[words - 1] & beyond))
      return fail(message, "row %lld of the bitmask keeps a column beyond %lld", LL(n), LL(w.columns));
    // Compared without adding: an offset can be anything.
    const int64_t first = w.row_offsets[n], next = w.row_offsets[n + 1];
    if (next < first || next - first != kept)
      return fail(message, "row %lld keeps %lld weights by the bitmask, its offsets are %lld to %lld",
                  LL(n), LL(kept), LL(first), LL(next));
  }
  const int64_t needed = w.row_offsets[w.rows] + ZS_PADDING;
  if (w.values_count < needed)
    return fail(message, "there are %lld values, %lld kept weights and %d of padding need %lld",
                LL(w.values_count), LL(needed - ZS_PADDING), (int)ZS_PADDING, LL(needed));
  if (w.value_type != ZS_INT8) {
    if (w.scales || w.scales_count || w.block_size)
      return fail(message, "scales and blocks go with int8 values only");
    return 0;
  }
  if (w.block_size < 0 || w.block_size % 64)
    return fail(message, "a block of %lld columns is not a multiple of 64", LL(w.block_size));
  const int64_t blocks =
      w.block_size ? std::max<int64_t>(1, (w.columns + w.block_size - 1) / w.block_size) : 1;
  if (w.scales_count != w.rows * blocks || (w.scales_count && !w.scales))
    return fail(message, "there are %lld scales, %lld rows of %lld blocks need %lld",
                LL(w.scales_count), LL(w.rows), LL(blocks), LL(w.rows * blocks));
  for (int64_t i = 0; i < w.scales_count; i++)
    if (!std::isfinite(w.scales[i])) return fail(message, "scale %lld is not finite", LL(i));
  return 0;
}

// Whether each `columns` columns keep half; random weights are found out by their first words.
bool is_even(const zs_weight& w, int64_t words, int columns) {
  if (w.columns % 64 || w.row_offsets[w.rows] != w.rows * words * 32) return false;
  for (int64_t i = 0; i < w.rows * words; i++)
    for (int first = 0; first < 64; first += columns)
      if (count_bits(w.bitmask[i] >> first & (((uint64_t)1 << columns) - 1)) != columns / 2)
        return false;
  return true;
}

Weight view(const zs_weight& w) {
  Weight v;
  v.rows = w.rows;
  v.columns = w.columns;
  v.words = (w.columns + 63) / 64;
  v.bitmask = w.bitmask;
  v.row_offsets = w.row_offsets;
  v.values = w.values;
  v.scales = w.scales;
  v.type = (zs_value_type)w.value_type;
  const bool whole = !w.block_size || v.words == 0;
  v.block_words = whole ? std::max<int64_t>(1, v.words) : w.block_size / 64;
  v.blocks = whole ? 1 : (v.words + v.block_words - 1) / v.block_words;
  const double total = (double)w.rows * (double)w.columns;
  v.density = total > 0 ? (double)w.row_offsets[w.rows] / total : 0;
  v.even = is_even(w, v.words, 16);
  v.even_eights = v.even && is_even(w, v.words, 8);
  return v;
}

// Whether some element of a row is an infinity or a NaN; written to be vectorised.
bool has_non_finite(const float* x, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    found |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
  }
  return found != 0;
}

void call_in_turn(void*, void (*task)(void*, size_t), size_t count, void* argument) {
  for (size_t i = 0; i < count; i++) task(argument, i);
}

struct Job {
  const Path* path;
  Call call;
  int64_t step;
};

void prepare_task(void* argument, size_t index) {
  const Job& job = *(const Job*)argument;
  job.path->prepare(job.call, (int64_t)index);
}

void rows_task(void* argument, size_t index) {
  const Job& job = *(const Job*)argument;
  const int64_t begin = (int64_t)index * job.step;
  job.path->rows(job.call, begin, std::min(job.call.weight.rows, begin + job.step));
}

// Rows of W in one task: enough work to be worth handing out, few enough to balance.
int64_t task_rows(const Path& path, const Weight& w, int64_t m) {
  const int64_t step = path.row_step(w, m);
  const double per_row = (double)w.columns * (w.density * (double)m + 0.3) + 1;
  const int64_t wanted = (int64_t)(100000 / per_row) + 1;
  return std::max(step, wanted / step * step);
}

// As a dense product would answer: a pruned weight times an infinity or a NaN is NaN.
void repair_row(const Weight& w, const float* x, int64_t m, float* y, const float* bias) {
  const Call call = {w, nullptr, x + m * w.columns, 1, y + m * w.rows, bias, nullptr};
  portable_dot.rows(call, 0, w.rows);
  std::vector<uint64_t> marked((size_t)w.words, 0);
  for (int64_t k = 0; k < w.columns; k++)
    if (!std::isfinite(call.x[k])) marked[(size_t)(k / 64)] |= (uint64_t)1 << k % 64;
  for (int64_t n = 0; n < w.rows; n++)
    for (int64_t i = 0; i < w.words; i++)
      if (marked[(size_t)i] & ~w.bitmask[n * w.words + i]) call.y[n] = NAN;
}

}  // namespace
}  // namespace zs

struct zs_linear {
  zs::Weight weight;
  int32_t accuracy_level = 0;
  std::vector<zs::Served> served;

  const zs::Served* choose(int64_t m) const {
    if (m <= 0) return nullptr;  // nothing to run; kernels count on a first token
    const zs::Served* best = nullptr;
    double least = INFINITY;
    for (const zs::Served& s : served) {
      if (!s.path->serves(weight, m, accuracy_level)) continue;
      const double cost = s.path->cost(weight, m);
      if (!best || cost < least) best = &s, least = cost;
    }
    return best;
  }
};

extern "C" {

int32_t zs_abi_version(void) { return ZS_ABI_VERSION; }

const char* zs_kernel_name(int32_t index) {
  const zs::PathList paths = zs::all_paths();
  for (const zs::Path* const* p = paths.begin; p != paths.end; p++)
    if (((*p)->needs & zs::cpu_features()) == (*p)->needs && index-- == 0) return (*p)->name;
  return nullptr;
}

int32_t zs_linear_create(const zs_weight* weight, const zs_options* options, zs_linear** linear,
                         char* message) {
  const zs_options none = {0, 0, nullptr, nullptr};
  const zs_options& o = options ? *options : none;
  *linear = nullptr;
  if (zs::check(*weight, message)) return 1;
  if (o.accuracy_level != 0 && o.accuracy_level != 4)
    return zs::fail(message, "accuracy_level is %d, not 0 or 4", (int)o.accuracy_level);
  if (o.layout != 0 && o.layout != 1)
    return zs::fail(message, "layout is %d, not 0 or 1", (int)o.layout);
  uint32_t features = zs::cpu_features();
  if (o.instruction_set && *o.instruction_set) {
    const uint32_t allowed = zs::features_up_to(o.instruction_set);
    if (allowed == ~0u)
      return zs::fail(message, "unknown instruction set %.40s", o.instruction_set);
    features &= allowed;
  }
  try {
    std::unique_ptr<zs_linear> made(new zs_linear);
    made->weight = zs::view(*weight);
    // 8-bit activations need 8-bit weights; others ignore the level.
    made->accuracy_level = weight->value_type == ZS_INT8 ? o.accuracy_level : 0;
    const zs::PathList paths = zs::all_paths();
    const bool named = o.kernel && *o.kernel;
    for (const zs::Path* const* p = paths.begin; p != paths.end; p++) {
      const zs::Path& path = **p;
      if ((path.needs & features) != path.needs) continue;
      if (named ? strcmp(path.name, o.kernel) != 0 : path.layout > o.layout) continue;
      bool serves = false;
      for (int64_t m : {1, 2, 4, 8, 16, 64, 512})
        serves |= path.serves(made->weight, m, made->accuracy_level);
      if (!serves) continue;
      zs::Served served = {&path, nullptr};
      if (path.make_form) served.form = path.make_form(made->weight);
      made->served.push_back(std::move(served));
    }
    if (made->served.empty())
      return zs::fail(message, "no kernel serves this weight%s%.40s", named ? ": " : "",
                      named ? o.kernel : "");
    *linear = made.release();
  } catch (const std::bad_alloc&) {
    return zs::fail(message, "out of memory");
  }
  return 0;
}

void zs_linear_destroy(zs_linear* linear) { delete linear; }

size_t zs_linear_bytes(const zs_linear* linear) {
  size_t total = sizeof(zs_linear);
  for (const zs::Served& s : linear->served) total += s.form ? s.form->bytes() : 0;
  return total;
}

const char* zs_linear_kernel(const zs_linear* linear, int64_t m) {
  const zs::Served* served = linear->choose(m);
  return served ? served->path->name : nullptr;
}

size_t zs_linear_workspace(const zs_linear* linear, int64_t m) {
  const zs::Served* served = linear->choose(m);
  return served && served->path->workspace ? served->path->workspace(linear->weight, m) : 0;
}

int32_t zs_linear_run(const zs_linear* linear, const float* x, int64_t m, float* y,
                      const float* bias, void* workspace, zs_parallel_for run, void* context) {
  const zs::Weight& w = linear->weight;
  if (m <= 0 || w.rows == 0) return 0;
  const zs::Served* served = linear->choose(m);
  if (!served) return 1;
  const zs::Path& path = *served->path;
  std::unique_ptr<char[]> owned;
  if (!workspace && path.workspace) {
    const size_t size = path.workspace(w, m);
    owned.reset(new (std::nothrow) char[size + 64]);
    if (!owned) return 1;
    workspace = owned.get() + (64 - (uintptr_t)owned.get() % 64) % 64;
  }
  zs::Job job = {&path, {w, served->form.get(), x, m, y, bias, (char*)workspace}, 0};
  job.step = zs::task_rows(path, w, m);
  const auto run_all = [&](void (*task)(void*, size_t), int64_t count) {
    if (run && count > 1)
      run(context, task, (size_t)count, &job);
    else
      zs::call_in_turn(nullptr, task, (size_t)count, &job);
  };
  if (path.prepare) run_all(zs::prepare_task, path.prepare_tasks(w, m));
  run_all(zs::rows_task, (w.rows + job.step - 1) / job.step);
  if (path.skips_zeros && !(path.finite && path.finite(job.call)))
    for (int64_t i = 0; i < m; i++)
      if (zs::has_non_finite(x + i * w.columns, w.columns)) {
        try {
          zs::repair_row(w, x, i, y, bias);
        } catch (const std::bad_alloc&) {
          return 1;
        }
      }
  return 0;
}

}  // extern "C"
