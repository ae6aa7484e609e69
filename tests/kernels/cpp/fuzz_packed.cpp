// A libFuzzer target: bytes become the arrays of a small weight; what the library accepts is run
// with every kernel.
//
//   clang++ -fsanitize=fuzzer,address,undefined ...            libFuzzer finds the inputs
//   c++ -DZS_FUZZ_ROUNDS=20000 -fsanitize=address,undefined    a plain program with random inputs
//
// The library cannot know how long an array truly is, so every array has the length it is said to
// have; everything else may be a lie. When the weight is made of tame numbers the answers of all
// kernels are compared with portable code as well.
#include "weights.h"

namespace {

// Takes numbers from the input; zeros when it ends.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint64_t number(int bytes) {
    uint64_t n = 0;
    for (int i = 0; i < bytes && left_; i++, left_--) n |= (uint64_t)*data_++ << 8 * i;
    return n;
  }
  bool once_in(uint64_t n) { return number(1) % n == n - 1; }

 private:
  const uint8_t* data_;
  size_t left_;
};

template <class T>
void fill(Reader& from, Exact<T>& to) {
  for (size_t i = 0; i < to.size(); i++) {
    const uint64_t bits = from.number(sizeof(T));
    memcpy(&to[i], &bits, sizeof(T));
  }
}

int64_t odd_number(Reader& from) {
  const int64_t some[] = {-1, 0, 1, 64, INT64_MAX, INT64_MIN, (int64_t)1 << 31, (int64_t)1 << 46};
  const uint64_t which = from.number(1) % 9;
  return which < 8 ? some[which] : (int64_t)from.number(8);
}

void die(const char* what, const char* kernel) {
  fprintf(stderr, "%s: %s\n", what, kernel);
  abort();
}

// The product by one kernel; empty when it does not serve.
std::vector<float> run(const zs_weight& view, const char* kernel, int32_t level, Exact<float>& x,
                       int64_t m) {
  const zs_options options = {1, level, nullptr, kernel};
  zs_linear* linear = nullptr;
  char message[ZS_MESSAGE_SIZE] = "";
  if (zs_linear_create(&view, &options, &linear, message)) {
    if (linear || !*message) die("refused without a reason", kernel);
    return {};
  }
  std::vector<float> answer;
  if (zs_linear_kernel(linear, m)) {
    Exact<float> y((size_t)(m * view.rows));
    if (zs_linear_run(linear, x.data(), m, y.data(), nullptr, nullptr, nullptr, nullptr))
      die("run failed", kernel);
    answer.assign(y.data(), y.data() + y.size());
  }
  zs_linear_destroy(linear);
  return answer;
}

void run_all(const zs_weight& view, int64_t m, bool tame, Reader& from) {
  Exact<float> x((size_t)(m * view.columns));
  for (size_t i = 0; i < x.size(); i++) {
    const uint32_t bits = (uint32_t)from.number(tame ? 1 : 4);
    memcpy(&x[i], &bits, 4);
    if (tame) x[i] = (float)bits / 16 - 8;
  }
  for (int32_t level : {0, 4}) {
    if (level == 4 && view.value_type != ZS_INT8) continue;
    const char* reference = level ? "portable-int8" : "portable-dot";
    const std::vector<float> expected = run(view, reference, level, x, m);
    for (int32_t i = 0; const char* kernel = zs_kernel_name(i); i++) {
      const std::vector<float> got = run(view, kernel, level, x, m);
      if (!tame || got.empty()) continue;
      // Tame numbers are at most 8 in size, and so are 16 columns of them: 2e-6 of all terms.
      // The AMX kernel takes x in 16 bits.
      const float share = strstr(kernel, "amx-bfloat16") ? 1.6e-5f : 2e-6f;
      const float allowed = share * 64 * (float)view.columns;
      for (size_t j = 0; j < got.size(); j++)
        if (!(std::fabs(got[j] - expected[j]) <= allowed)) die("a wrong answer", kernel);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader from(data, size);
  const zs_value_type type = (zs_value_type)(from.number(1) % 4);
  // Small, for many runs a second; now and then more rows than any kernel takes at once.
  const bool large = from.once_in(32);
  const int64_t rows = (int64_t)(from.number(1) % (large ? 70 : 10));
  const int64_t columns = (int64_t)(from.number(2) % (large ? 600 : 200));
  const int64_t m = 1 + (int64_t)(from.number(1) % (large ? 70 : 6));
  const int64_t block = type == ZS_INT8 ? (int64_t)(from.number(1) % 4) * 64 : 0;
  const Shape shape = {rows, columns, block, type};
  const bool tame = from.once_in(2);

  // Usually right, so that the kernels are reached; then some things are broken.
  Exact<uint64_t> bitmask((size_t)(rows * words_of(shape)));
  fill(from, bitmask);
  Exact<int64_t> offsets((size_t)rows + 1);
  offsets[0] = 0;
  for (int64_t n = 0; n < rows; n++) {
    int64_t kept = 0;
    for (int64_t i = 0; i < words_of(shape); i++) {
      uint64_t& word = bitmask[(size_t)(n * words_of(shape) + i)];
      const int64_t left = columns - i * 64;
      if (left < 64 && !from.once_in(64)) word &= ((uint64_t)1 << left) - 1;
      kept += __builtin_popcountll(word);
    }
    offsets[(size_t)n + 1] = offsets[(size_t)n] + kept;
  }
  const int64_t kept = offsets[(size_t)rows];
  if (from.once_in(16)) offsets[from.number(1) % offsets.size()] = odd_number(from);
  const int64_t short_by = from.once_in(16) ? (int64_t)from.number(1) : 0;
  const int64_t stored = std::max<int64_t>(0, kept + ZS_PADDING - short_by);
  Exact<unsigned char> values(((size_t)stored + 1) * bytes_of(type));
  fill(from, values);
  unsigned char* first = (unsigned char*)(((uintptr_t)values.data() + bytes_of(type) - 1) /
                                          bytes_of(type) * bytes_of(type));
  for (int64_t i = 0; tame && i < stored; i++) {
    const float small = (float)first[(size_t)i * bytes_of(type)] / 16 - 8;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    const uint16_t top = (uint16_t)(bits >> 16);
    const uint16_t half = (uint16_t)(0x3000 | first[(size_t)i * bytes_of(type)]);
    if (type == ZS_FLOAT32) memcpy(first + i * 4, &bits, 4);
    if (type == ZS_BFLOAT16) memcpy(first + i * 2, &top, 2);
    if (type == ZS_FLOAT16) memcpy(first + i * 2, &half, 2);
  }
  Exact<float> scales(type == ZS_INT8 ? (size_t)(rows * blocks_of(shape)) : 0);
  for (size_t i = 0; i < scales.size(); i++) {
    const uint32_t bits = (uint32_t)from.number(tame ? 1 : 4);
    memcpy(&scales[i], &bits, 4);
    if (tame) scales[i] = (float)bits / 4096;
  }

  zs_weight view = {};
  view.rows = rows;
  view.columns = columns;
  view.bitmask = bitmask.data();
  view.bitmask_count = (int64_t)bitmask.size();
  view.row_offsets = offsets.data();
  view.row_offsets_count = (int64_t)offsets.size();
  view.values = first;
  view.values_count = stored;
  view.scales = type == ZS_INT8 ? scales.data() : nullptr;
  view.scales_count = (int64_t)scales.size();
  view.block_size = block;
  view.value_type = type;
  if (from.once_in(16)) {
    int64_t* sizes[] = {&view.rows, &view.columns, &view.block_size};
    *sizes[from.number(1) % 3] = odd_number(from);
  }
  if (from.once_in(32)) view.value_type = (int32_t)odd_number(from);
  // A wider type would need more memory than there is.
  if (view.value_type >= ZS_FLOAT32 && view.value_type < type) return 0;

  zs_linear* linear = nullptr;
  char message[ZS_MESSAGE_SIZE] = "";
  if (zs_linear_create(&view, nullptr, &linear, message)) {
    if (linear || !*message) die("refused without a reason", "any");
    return 0;
  }
  zs_linear_destroy(linear);
  // A weight without columns may have any number of them that its arrays allow: none.
  if (view.rows > 100 || view.columns > 1000) return 0;
  run_all(view, m, tame && view.value_type == type && view.columns == columns, from);
  return 0;
}

#ifdef ZS_FUZZ_ROUNDS
int main() {
  std::mt19937_64 random(11);
  std::vector<uint8_t> bytes;
  for (int round = 0; round < ZS_FUZZ_ROUNDS; round++) {
    bytes.resize(random() % 2000);
    for (uint8_t& byte : bytes) byte = (uint8_t)(random() & (round % 3 ? 255 : random()));
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  printf("%d inputs\n", (int)ZS_FUZZ_ROUNDS);
  return 0;
}
#endif
