// A libFuzzer target: bytes become a small weight, true or lying, and one product with it.
//
//   python tests/kernels/fuzz.py                        builds it with clang and runs it
//   c++ -DZS_FUZZ_ROUNDS=2000 -fsanitize=address ...    a plain program with random inputs
//
// An input names one kernel, so that each run is short and libFuzzer sees which kernel an input
// took; it goes through the C interface or through the checks of the ONNX operator. The library
// cannot know how long an array truly is, so no count is larger than the array; everything else may
// be a lie. What is accepted is run in memory of exactly the size that the interface asks for, and
// where the numbers are tame the answer is compared with a product in double.
#include <memory>
#include <stdexcept>

#include "onnxruntime_weight.h"
#include "weights.h"

namespace {

void die(const char* what, const char* which) {
  fprintf(stderr, "%s: %s\n", what, which);
  abort();
}

// Takes numbers from the input and then, without end, from a random sequence: short inputs make
// whole weights, which keeps runs fast and mutations meaningful.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size, uint64_t start)
      : data_(data), left_(size), random_(start) {}

  uint64_t number(size_t bytes) {
    uint64_t n = 0;
    if (left_ < bytes) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      return random_ >> (64 - 8 * bytes);
    }
    memcpy(&n, data_, bytes);
    data_ += bytes;
    left_ -= bytes;
    return n;
  }
  int64_t below(int64_t n) { return (int64_t)(number(n <= 256 ? 1 : 2) % (uint64_t)n); }
  bool once_in(int64_t n) { return below(n) == n - 1; }

 private:
  const uint8_t* data_;
  size_t left_;
  uint64_t random_;
};

int64_t odd_number(Reader& from) {
  const int64_t some[] = {-1,        0,         1,  4,
                          64,        100,       65, (int64_t)1 << 31,
                          INT64_MAX, INT64_MIN, 5,  (int64_t)1 << 32,
                          1 << 20,   128,       3,  (int64_t)1 << 46};
  const int64_t which = from.below(17);
  return which < 16 ? some[which] : (int64_t)from.number(8);
}

// Where the values begin: aligned to an element, and no better.
unsigned char* aligned(Exact<unsigned char>& bytes, size_t size) {
  return (unsigned char*)(((uintptr_t)bytes.data() + size - 1) / size * size);
}

// The arrays of a weight, and what is said about them.
struct Input {
  Shape shape;
  bool tame;  // small finite numbers
  bool lies = false;
  Exact<uint64_t> bitmask;
  Exact<int64_t> row_offsets;
  std::unique_ptr<Exact<unsigned char>> values, moved;
  Exact<float> scales;
  zs_weight view = {};

  Input(Reader& from, Reader& content, const Shape& s)
      : shape(s),
        tame(!from.once_in(3)),
        bitmask((size_t)(s.rows * words_of(s))),
        row_offsets((size_t)s.rows + 1),
        scales(s.type == ZS_INT8 ? (size_t)(s.rows * blocks_of(s)) : 0) {
    fill_mask(from, content);
    const int64_t kept = row_offsets[(size_t)s.rows];
    const int64_t missing = from.once_in(32) ? 1 + from.below(100) : 0;
    lies |= missing > 0;
    const int64_t stored = std::max<int64_t>(0, kept + ZS_PADDING - missing);
    fill_values(content, stored);
    for (size_t i = 0; i < scales.size(); i++) {
      const uint32_t bits = (uint32_t)content.number(tame ? 1 : 4);
      memcpy(&scales[i], &bits, 4);
      if (tame) scales[i] = (float)bits / 4096;
      lies |= !std::isfinite(scales[i]);
    }
    view.rows = s.rows;
    view.columns = s.columns;
    view.bitmask = bitmask.data();
    view.bitmask_count = (int64_t)bitmask.size();
    view.row_offsets = row_offsets.data();
    view.row_offsets_count = (int64_t)row_offsets.size();
    view.values = aligned(*values, bytes_of(s.type));
    view.values_count = stored;
    view.scales = s.type == ZS_INT8 ? scales.data() : nullptr;
    view.scales_count = (int64_t)scales.size();
    view.block_size = s.type == ZS_INT8 ? s.block_size : 0;
    view.value_type = s.type;
    if (from.once_in(4)) lie(from);
    if (from.once_in(16)) lie(from);
  }

 private:
  void fill_mask(Reader& from, Reader& content) {
    const int64_t words = words_of(shape);
    // Dense, half full, sparse, empty: random words joined by these.
    const int64_t density = from.below(5);
    const bool stray = from.once_in(32);  // bits beyond the last column
    row_offsets[0] = 0;
    for (int64_t n = 0; n < shape.rows; n++) {
      int64_t kept = 0;
      for (int64_t i = 0; i < words; i++) {
        uint64_t bits = content.number(8);
        if (density == 1) bits |= content.number(8) | content.number(8);
        if (density == 2) bits &= content.number(8) & content.number(8);
        if (density == 3) bits &= content.number(1) % 8 ? 0 : bits;
        if (density == 4) bits = bits % 5 ? 0x5555555555555555u : 0x9999999999999999u;
        const int64_t left = shape.columns - i * 64;
        if (left < 64) {
          const uint64_t inside = ((uint64_t)1 << left) - 1;
          lies |= stray && (bits & ~inside);
          if (!stray) bits &= inside;
        }
        bitmask[(size_t)(n * words + i)] = bits;
        kept += __builtin_popcountll(bits);
      }
      row_offsets[(size_t)n + 1] = row_offsets[(size_t)n] + kept;
    }
  }

  void fill_values(Reader& content, int64_t stored) {
    const size_t size = bytes_of(shape.type);
    values.reset(new Exact<unsigned char>(((size_t)stored + 1) * size));
    unsigned char* at = aligned(*values, size);
    for (int64_t i = 0; i < stored; i++, at += size) {
      uint32_t bits = (uint32_t)content.number(tame ? 1 : size);
      if (tame && shape.type == ZS_FLOAT16)
        bits = (bits & 0x80) << 8 | 0x3000 | (bits & 0x7f) << 3;
      if (tame && (shape.type == ZS_FLOAT32 || shape.type == ZS_BFLOAT16)) {
        const float small = (float)bits / 16 - 8;
        memcpy(&bits, &small, 4);
        if (shape.type == ZS_BFLOAT16) bits >>= 16;
      }
      memcpy(at, &bits, size);
    }
  }

  int64_t& any_offset(Reader& from) {
    return row_offsets[(size_t)from.below((int64_t)row_offsets.size())];
  }

  // Copies an array to an odd address: the operator takes it, the interface does not.
  template <class Pointer>
  void move(Pointer& array, size_t size) {
    if (!array || moved) return;
    moved.reset(new Exact<unsigned char>(size));
    if (size) memcpy(moved->data(), array, size);
    array = (Pointer)moved->data();
  }

  // Counts only shrink.
  void shrink(Reader& from, int64_t& count) {
    if (count <= 0) return;
    const int64_t number = odd_number(from);
    count = number < count ? number : count - 1;
  }

  void lie(Reader& from) {
    lies = true;
    switch (from.below(13)) {
      case 0: view.rows = odd_number(from); break;
      case 1: view.columns = odd_number(from); break;
      case 2: view.block_size = odd_number(from); break;
      case 3: view.value_type = (int32_t)odd_number(from); break;
      case 4: shrink(from, view.bitmask_count); break;
      case 5: shrink(from, view.row_offsets_count); break;
      case 6: shrink(from, view.values_count); break;
      case 7: shrink(from, view.scales_count); break;
      case 8: any_offset(from) = odd_number(from); break;
      case 9: any_offset(from) ^= 1 + from.below(2); break;
      case 10: move(view.bitmask, bitmask.size() * 8); break;
      case 11:
        move(view.values, (size_t)std::max<int64_t>(0, view.values_count) * bytes_of(shape.type));
        break;
      case 12:
        if (from.once_in(2)) view.values = nullptr;
        if (from.once_in(2)) view.bitmask = nullptr;
        if (from.once_in(2)) view.row_offsets = nullptr;
        if (from.once_in(2)) view.scales = nullptr;
        break;
    }
  }
};

// How the library was asked to run a weight, and what it made of it.
struct Made {
  std::unique_ptr<zs_linear, void (*)(zs_linear*)> own{nullptr, zs_linear_destroy};
  std::unique_ptr<zs::PackedWeight> packed;
  const zs_linear* linear = nullptr;
  int32_t level = 0;  // 4: x is rounded to 8 bits
  std::string refusal;
};

// Straight through the C interface.
void make_by_interface(Reader& from, const Input& input, int32_t level, Made& made) {
  const int64_t which = from.below(32);  // a kernel by its number; those too large: let it choose
  const char* sets[] = {nullptr, nullptr, "portable", "avx2", "avx512", "amx", "", "vax"};
  zs_options options = {};
  for (int32_t i = 0; i <= which; i++)
    if (!(options.kernel = zs_kernel_name(i))) break;
  options.layout = (int32_t)from.below(2);
  options.accuracy_level = level;
  options.instruction_set = options.kernel ? nullptr : sets[from.below(8)];
  zs_linear* linear = nullptr;
  char message[ZS_MESSAGE_SIZE] = "";
  const bool defaults = from.once_in(64);
  made.level = defaults ? 0 : level;
  if (zs_linear_create(&input.view, defaults ? nullptr : &options, &linear, message)) {
    if (linear || !*message) die("refused without a reason", "C interface");
    made.refusal = message;
  }
  made.own.reset(linear);
  made.linear = linear;
}

// Through the checks of the ONNX operator, which gets shapes instead of counts.
void make_by_operator(Reader& from, const Input& input, int32_t level, Made& made) {
  const ONNXTensorElementDataType types[] = {
      ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
      ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8};
  const zs_weight& view = input.view;
  // What the operator's kernel has checked before it comes here.
  const int64_t largest = (int64_t)1 << 40;
  if (view.rows < 0 || view.columns < 0 || view.rows > largest || view.columns > largest) {
    made.refusal = "not the sides of a weight";
    return;
  }
  const auto at_least_0 = [](int64_t count) { return std::max<int64_t>(0, count); };
  const bool known = view.value_type >= ZS_FLOAT32 && view.value_type <= ZS_INT8;
  const int64_t words = words_of(input.shape);
  zs::WeightTensors tensors = {};
  const bool whole = view.bitmask_count == input.shape.rows * words;
  tensors.bitmask = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                     whole ? std::vector<int64_t>{input.shape.rows, words * 8}
                           : std::vector<int64_t>{1, at_least_0(view.bitmask_count) * 8},
                     const_cast<uint64_t*>(view.bitmask)};
  tensors.row_offsets = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
                         {at_least_0(view.row_offsets_count)},
                         const_cast<int64_t*>(view.row_offsets)};
  tensors.values = {known ? types[view.value_type] : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                    {at_least_0(view.values_count)},
                    const_cast<void*>(view.values)};
  // The function body wants scales for values of every type: ones where they are not int8, which
  // are read here only.
  Exact<float> ones((size_t)input.shape.rows);
  for (size_t i = 0; i < ones.size(); i++) ones[i] = 1;
  if (ones.size() && from.once_in(32)) ones[ones.size() - 1] = 2;
  const bool own = view.scales_count == (int64_t)input.scales.size() && view.scales;
  tensors.has_scales = own || (view.value_type != ZS_INT8 && from.once_in(2));
  tensors.scales = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                    {input.shape.rows, own ? blocks_of(input.shape) : 1},
                    own ? const_cast<float*>(view.scales) : ones.data()};
  zs::Attributes attributes;
  attributes.rows = view.rows;
  attributes.columns = view.columns;
  attributes.block_size = view.block_size;
  attributes.accuracy_level = made.level = level;
  attributes.layout = from.below(2);
  const char* sets[] = {"", "", "", "portable", "avx2", "avx512", "amx", "neon", "vax"};
  attributes.instruction_set = sets[from.below(9)];
  try {
    made.packed.reset(new zs::PackedWeight(tensors, attributes));
    made.linear = made.packed->linear();
  } catch (const std::runtime_error& error) {
    made.refusal = error.what();
    if (made.refusal.empty()) die("refused without a reason", "operator");
  }
}

// An element of an array that may lie anywhere.
template <class T>
T load(const void* array, int64_t i) {
  T value;
  memcpy(&value, (const char*)array + (size_t)i * sizeof(T), sizeof(T));
  return value;
}

double value_at(const zs_weight& w, int64_t i) {
  switch (w.value_type) {
    case ZS_FLOAT32: return load<float>(w.values, i);
    case ZS_FLOAT16: return zs::float16_to_float(load<uint16_t>(w.values, i));
    case ZS_BFLOAT16: return zs::bfloat16_to_float(load<uint16_t>(w.values, i));
  }
  return load<int8_t>(w.values, i);
}

// The dense weight in double.
std::vector<double> unpack(const zs_weight& w) {
  std::vector<double> dense((size_t)(w.rows * w.columns), 0.0);
  const int64_t words = (w.columns + 63) / 64;
  const int64_t blocks = w.rows ? w.scales_count / w.rows : 1;
  int64_t next = 0;
  for (int64_t n = 0; n < w.rows; n++)
    for (int64_t k = 0; k < w.columns; k++) {
      if (!(load<uint64_t>(w.bitmask, n * words + k / 64) >> k % 64 & 1)) continue;
      double& to = dense[(size_t)(n * w.columns + k)];
      to = value_at(w, next++);
      if (w.scales) to *= w.scales[n * blocks + (w.block_size ? k / w.block_size : 0)];
    }
  return dense;
}

struct Sum {
  double value, size;  // size: of all terms without their signs
};

// Not instrumented: it is no part of what is tested, and would take half of the time.
#ifdef __clang__
__attribute__((no_sanitize("address", "undefined", "coverage")))
#endif
Sum dot(const double* a, const double* b, int64_t count) {
  Sum sum = {0, 0};
  for (int64_t k = 0; k < count; k++) {
    const double term = a[k] * b[k];
    sum.value += term;
    sum.size += std::fabs(term);
  }
  return sum;
}

// Dies unless y is x W^T + bias, as far as float32 sums can be.
void compare(const zs_weight& w, int32_t level, const Exact<float>& x, int64_t m, const float* bias,
             const Exact<float>& y, const char* kernel) {
  const std::vector<double> dense = unpack(w);
  const double share = strstr(kernel, "amx-bfloat16") ? 1.6e-5 : 2e-6;  // it takes x in 16 bits
  for (int64_t i = 0; i < m; i++) {
    std::vector<double> row(x.data() + i * w.columns, x.data() + (i + 1) * w.columns);
    bool finite = true;
    for (double value : row) finite &= std::isfinite(value);
    if (level == 4 && finite) round_to_8_bits(row.data(), w.columns);
    for (int64_t n = 0; n < w.rows; n++) {
      const Sum terms = dot(dense.data() + n * w.columns, row.data(), w.columns);
      const double sum = level == 4 && !finite ? NAN : terms.value + (bias ? bias[n] : 0);
      const double got = y[(size_t)(i * w.rows + n)];
      const bool same = std::isfinite(sum) ? std::fabs(got - sum) <= share * (terms.size + 1)
                        : std::isnan(sum)  ? std::isnan(got)
                                           : got == sum;
      if (same) continue;
      fprintf(stderr, "[%d, %d] type %d level %d m %d: y[%d, %d] is %g, not %g\n", (int)w.rows,
              (int)w.columns, (int)w.value_type, (int)level, (int)m, (int)i, (int)n, got, sum);
      die("a wrong answer", kernel);
    }
  }
}

// A parallel_for that takes the tasks in the other order.
void last_first(void*, void (*task)(void*, size_t), size_t count, void* argument) {
  while (count) task(argument, --count);
}

void run(Reader& from, Reader& content, const Input& input, const Made& made, int64_t m) {
  const zs_linear* linear = made.linear;
  const zs_weight& w = input.view;
  const bool special = from.once_in(8), with_bias = from.once_in(2);
  const bool own_workspace = from.once_in(2);
  Exact<float> x((size_t)(m * w.columns)), bias((size_t)w.rows), y((size_t)(m * w.rows));
  for (size_t i = 0; i < x.size(); i++) {
    const uint32_t bits = (uint32_t)content.number(input.tame ? 1 : 4);
    memcpy(&x[i], &bits, 4);
    if (input.tame) x[i] = (float)bits / 16 - 8;
  }
  const float specials[] = {INFINITY, -INFINITY, NAN};
  if (special && x.size()) x[from.number(2) % x.size()] = specials[from.below(3)];
  for (size_t i = 0; i < bias.size(); i++) bias[i] = (float)(i % 9) - 4;

  zs_linear_bytes(linear);
  const size_t size = zs_linear_workspace(linear, m);
  void* workspace = nullptr;
  if (size && own_workspace && posix_memalign(&workspace, 64, size)) abort();
  if (workspace) memset(workspace, 0xff, size);
  const char* kernel = zs_linear_kernel(linear, m);
  const int32_t failed =
      zs_linear_run(linear, x.data(), m, y.data(), with_bias ? bias.data() : nullptr, workspace,
                    from.once_in(2) ? last_first : nullptr, nullptr);
  free(workspace);
  if (failed && kernel) die("run failed", kernel);
  if (!failed && !kernel && m && w.rows) die("no kernel, but an answer", "none");
  if (kernel && input.tame)
    compare(w, made.level, x, m, with_bias ? bias.data() : nullptr, y, kernel);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Choices come first and the content of the arrays after them, so that neither moves the other.
  const size_t choices = std::min<size_t>(size, 40);
  Reader from(data, choices, 0);
  Reader content(data + choices, size - choices, from.number(2));
  const zs_value_type type = (zs_value_type)from.below(4);
  const int32_t level = type == ZS_INT8 && from.once_in(2) ? 4 : 0;
  // Small, for many runs a second; now and then more of one thing than any kernel takes at once.
  const int64_t large = from.below(64);
  const int64_t rows = from.below(large == 1 ? 80 : 9);
  const int64_t columns = from.below(large == 2 ? 900 : 200);
  const int64_t m = from.below(large < 8 ? 150 : large < 24 ? 20 : 6);
  const int64_t block = type == ZS_INT8 ? from.below(4) * 64 : 0;
  Input input(from, content, {rows, columns, block, type});
  // A wider type would need more memory than there is.
  const zs_weight& view = input.view;
  if (view.value_type >= ZS_FLOAT32 && view.value_type < type) return 0;

  const bool by_operator = from.once_in(4);
  Made made;
  if (by_operator)
    make_by_operator(from, input, level, made);
  else
    make_by_interface(from, input, level, made);
  if (!made.linear) {
    const bool asked = made.refusal.find("no kernel serves") != std::string::npos ||
                       made.refusal.find("unknown instruction set") != std::string::npos;
    if (!input.lies && !asked && !by_operator)
      die("a good weight is refused", made.refusal.c_str());
    return 0;
  }
  // A weight without rows may have any number of columns: its arrays are empty.
  if (view.columns > 1000) return 0;
  run(from, content, input, made, m);
  return 0;
}

#ifdef ZS_FUZZ_ROUNDS
int main() {
  std::mt19937_64 random(11);
  std::vector<uint8_t> bytes;
  for (int round = 0; round < ZS_FUZZ_ROUNDS; round++) {
    bytes.resize(random() % 100);
    for (uint8_t& byte : bytes) byte = (uint8_t)random();
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  printf("%d inputs\n", (int)ZS_FUZZ_ROUNDS);
  return 0;
}
#endif
