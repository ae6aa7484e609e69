// Compares every kernel that this CPU can run with a dense product in double.
//
//   check_kernels [all | quick | threads | hostile]
//
// It is built with sanitizers, and for other CPUs to run under an emulator; all memory is of
// exactly the size that the interface asks for. The exit status says whether all is well.
#include <cstdarg>
#include <memory>
#include <thread>

#include "weights.h"

namespace {

int failures = 0;
long comparisons = 0;

void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
  if (++failures > 20) exit(1);
}

struct Closer {
  void operator()(zs_linear* linear) const { zs_linear_destroy(linear); }
};
using Linear = std::unique_ptr<zs_linear, Closer>;

struct PoolCloser {
  void operator()(zs_pool* pool) const { zs_pool_destroy(pool); }
};

struct Case {
  const char* kernel;  // null: chosen by the library
  int32_t layout, level;
};

// What a kernel is given besides the weight, and what it must answer.
struct Product {
  int64_t m;
  Exact<float> x, bias;
  std::vector<double> y, allowed;

  // `special`: infinities and NaNs in every other row of x.
  Product(const TestWeight& w, int64_t tokens, int32_t level, bool special)
      : m(tokens),
        x((size_t)(m * w.shape.columns)),
        bias((size_t)w.shape.rows),
        y((size_t)(m * w.shape.rows)),
        allowed(y.size()) {
    const int64_t rows = w.shape.rows, columns = w.shape.columns;
    std::mt19937 random((uint32_t)(m + rows));
    std::uniform_real_distribution<float> unit(-1, 1);
    for (size_t i = 0; i < x.size(); i++) x[i] = unit(random);
    for (size_t i = 0; i < bias.size(); i++) bias[i] = unit(random);
    const float specials[] = {INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; special && columns && i < m; i += 2)
      x[(size_t)(i * columns) + random() % (size_t)columns] = specials[i / 2 % 3];
    for (int64_t i = 0; i < m; i++) {
      std::vector<double> row(x.data() + i * columns, x.data() + (i + 1) * columns);
      bool finite = true;
      for (double v : row) finite &= std::isfinite(v);
      if (level == 4 && finite) round_to_8_bits(row.data(), columns);
      for (int64_t n = 0; n < rows; n++) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < columns; k++) {
          const double term = w.dense[(size_t)(n * columns + k)] * row[(size_t)k];
          sum += term;
          size += std::fabs(term);
        }
        y[(size_t)(i * rows + n)] = level == 4 && !finite ? NAN : sum;
        allowed[(size_t)(i * rows + n)] = 2e-6 * (size + 1);
      }
    }
  }
};

void compare(const Shape& s, const Case& test, const Product& product, const zs_linear* linear,
             zs_pool* pool, bool with_bias, bool own_workspace) {
  const int64_t m = product.m;
  Exact<float> y((size_t)(m * s.rows));
  void* workspace = nullptr;
  const size_t size = zs_linear_workspace(linear, m);
  if (size && own_workspace) {
    if (posix_memalign(&workspace, 64, size)) abort();
    memset(workspace, 0xff, size);
  }
  const float* bias = with_bias ? product.bias.data() : nullptr;
  const int32_t failed = zs_linear_run(linear, product.x.data(), m, y.data(), bias, workspace,
                                       pool ? zs_pool_run : nullptr, pool);
  free(workspace);
  const char* name = zs_linear_kernel(linear, m);
  if (failed) return complain("%s: run failed", name);
  for (size_t i = 0; i < y.size(); i++) {
    const double wanted = product.y[i] + (bias ? bias[i % (size_t)s.rows] : 0.0f), got = y[i];
    // x in two bfloat16 parts has 16 bits; everything else computes in float32.
    const double allowed = product.allowed[i] * (strstr(name, "amx-bfloat16") ? 8 : 1);
    const bool same = std::isfinite(wanted) ? std::fabs(got - wanted) <= allowed
                      : std::isnan(wanted)  ? std::isnan(got)
                                            : got == wanted;
    comparisons++;
    if (!same)
      return complain("%s level %d type %d [%lld x %lld] block %lld m %lld: y[%zu] is %g, not %g",
                      name, test.level, s.type, (long long)s.rows, (long long)s.columns,
                      (long long)s.block_size, (long long)m, i, got, wanted);
  }
}

Linear create(const TestWeight& w, unsigned char* values, const Case& test) {
  const zs_options options = {test.layout, test.level, nullptr, test.kernel};
  const zs_weight view = w.view(values);
  zs_linear* linear = nullptr;
  char message[ZS_MESSAGE_SIZE] = "";
  if (!zs_linear_create(&view, &options, &linear, message)) return Linear(linear);
  if (!strstr(message, "no kernel serves")) complain("refused: %s", message);
  return nullptr;
}

std::vector<Case> cases(int32_t level) {
  std::vector<Case> all;
  for (int32_t i = 0; const char* name = zs_kernel_name(i); i++)
    all.push_back({name, 1, level});
  for (int32_t layout : {0, 1}) all.push_back({nullptr, layout, level});
  return all;
}

void check_weight(const Shape& shape, double density, zs_pool* pool) {
  const TestWeight w(shape, density, (uint32_t)(shape.rows * 31 + shape.columns));
  Exact<unsigned char> values = w.values();
  for (int32_t level : {0, 4}) {
    if (level == 4 && shape.type != ZS_INT8) continue;
    std::vector<std::pair<Case, Linear>> linears;
    for (const Case& test : cases(level))
      if (Linear made = create(w, w.values_in(values), test))
        linears.emplace_back(test, std::move(made));
    for (int64_t m : {1, 2, 3, 4, 5, 7, 17, 33}) {
      if (shape.columns > 1000 && m != 1 && m != 3) continue;
      const Product plain(w, m, level, false), special(w, m, level, true);
      for (const auto& [test, linear] : linears) {
        if (!zs_linear_kernel(linear.get(), m)) continue;
        compare(shape, test, plain, linear.get(), pool, true, true);
        compare(shape, test, special, linear.get(), nullptr, false, false);
      }
    }
  }
}

int check_all(bool quick) {
  const std::unique_ptr<zs_pool, PoolCloser> pool(zs_pool_create(2));
  const int64_t sizes[][2] = {{1, 1},   {0, 5},    {3, 0},    {0, 0},   {3, 64},  {5, 63},
                              {7, 65},  {4, 128},  {17, 200}, {35, 577}, {3, 70001}};
  for (const auto& size : sizes)
    for (zs_value_type type : {ZS_FLOAT32, ZS_FLOAT16, ZS_BFLOAT16, ZS_INT8})
      for (int64_t block : {0, 64, 192}) {
        if (block && type != ZS_INT8) continue;
        if (block == 64 && size[1] > 1000) continue;
        for (double density : {0.5, 0.1, 1.0, -1.0}) {
          if ((quick || size[1] > 1000) && density != 0.5) continue;
          check_weight({size[0], size[1], block, type}, density, pool.get());
        }
      }
  return failures != 0;
}

// Many threads on one linear: with a pool of their own each, one pool for all, or none.
int check_threads() {
  for (zs_value_type type : {ZS_FLOAT32, ZS_INT8})
    for (int32_t level : {0, 4}) {
      if (level == 4 && type != ZS_INT8) continue;
      const TestWeight w({300, 200, 0, type}, 0.5, 1);
      Exact<unsigned char> values = w.values();
      for (const Case& test : cases(level)) {
        const Linear linear = create(w, w.values_in(values), test);
        if (!linear || !zs_linear_kernel(linear.get(), 16)) continue;
        const std::unique_ptr<zs_pool, PoolCloser> shared(zs_pool_create(3));
        std::vector<float> x(16 * 200, 0.5f), first(16 * 300);
        zs_linear_run(linear.get(), x.data(), 16, first.data(), nullptr, nullptr, nullptr, nullptr);
        std::vector<std::thread> threads;
        std::vector<int> wrong(4, 0);
        for (int t = 0; t < 4; t++)
          threads.emplace_back([&, t] {
            const std::unique_ptr<zs_pool, PoolCloser> own(zs_pool_create(2));
            zs_pool* pools[] = {shared.get(), own.get(), nullptr};
            std::vector<float> y(16 * 300);
            for (int i = 0; i < 6; i++) {
              zs_pool* pool = pools[(t + i) % 3];
              std::fill(y.begin(), y.end(), NAN);
              zs_linear_run(linear.get(), x.data(), 16, y.data(), nullptr, nullptr,
                            pool ? zs_pool_run : nullptr, pool);
              wrong[t] += y != first;
            }
          });
        for (std::thread& thread : threads) thread.join();
        for (int t : wrong) comparisons++, failures += t != 0;
      }
    }
  return failures != 0;
}

// Weights that contradict themselves are refused, and nothing beyond their arrays is read.
int check_hostile() {
  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 3000; round++) {
    const zs_value_type type = (zs_value_type)(random() % 4);
    const Shape shape = {(int64_t)(random() % 9), (int64_t)(random() % 200),
                         (int64_t)(random() % 3 * 64), type};
    TestWeight w(shape, 0.5, random());
    Exact<unsigned char> values = w.values();
    zs_weight view = w.view(w.values_in(values));
    const int64_t numbers[] = {-1,        0,         1,  63, 65, INT64_MAX / 8,
                               INT64_MAX, INT64_MIN, (int64_t)1 << 40};
    const int64_t number = numbers[random() % 9];
    const int kind = random() % 9;
    // Counts only shrink: a caller that says an array is longer than it is cannot be found out.
    const auto shrink = [&](int64_t& count) { count = number < count ? number : count - 1; };
    switch (kind) {
      case 0: view.rows = number == view.rows ? -1 : number; break;
      case 1: view.columns = number; break;
      case 2: w.row_offsets[random() % w.row_offsets.size()] ^= number ? number : 1; break;
      case 3: shrink(view.values_count); break;
      case 4: shrink(view.bitmask_count); break;
      case 5: shrink(view.row_offsets_count); break;
      case 6: view.value_type = round % 2 ? 4 + (int32_t)(random() % 100) : -1; break;
      case 7: view.block_size = 1 + (int64_t)(random() % 63) + (number & ~(int64_t)63); break;
      case 8:
        if (w.bitmask.size())
          w.bitmask[random() % w.bitmask.size()] ^= (uint64_t)1 << random() % 64;
        break;
    }
    zs_linear* linear = nullptr;
    char message[ZS_MESSAGE_SIZE] = "";
    const int32_t failed = zs_linear_create(&view, nullptr, &linear, message);
    // Columns within the same word change nothing.
    const bool harmless = kind == 1 || (kind == 8 && !w.bitmask.size());
    if (!failed && !harmless) complain("round %d: change %d was accepted", round, kind);
    if (failed && (linear || !*message)) complain("round %d: a refusal without a message", round);
    refused += failed;
    comparisons++;
    if (failed) continue;
    if (view.columns > 1000) {  // no rows, so any number of columns is right
      zs_linear_destroy(linear);
      continue;
    }
    std::vector<float> x((size_t)(3 * view.columns), 1.0f), y((size_t)(3 * view.rows));
    zs_linear_run(linear, x.data(), 3, y.data(), nullptr, nullptr, nullptr, nullptr);
    zs_linear_destroy(linear);
  }
  printf("%d refused\n", refused);
  return failures != 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "all";
  for (int32_t i = 0; const char* name = zs_kernel_name(i); i++) printf("%s ", name);
  printf("\n");
  const int failed = mode == "threads"   ? check_threads()
                     : mode == "hostile" ? check_hostile()
                                         : check_all(mode == "quick");
  printf("%ld comparisons, %d failures\n", comparisons, failures);
  return failed;
}
