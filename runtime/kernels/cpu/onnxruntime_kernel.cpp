// One SparseLinear node at work: attributes, constants, threads and scratch memory.
#include "onnxruntime_kernel.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_runtime.h"
#include "onnxruntime_weight.h"
#include "sparse_linear.h"

namespace zs {
namespace {

constexpr int64_t kLargestSide = (int64_t)1 << 40;  // as zs_linear_create

// Memory of the session's arena: it was touched before, so that a call pays for no page faults.
class Scratch {
 public:
  Scratch(const Runtime& runtime, OrtKernelContext* context, const OrtMemoryInfo* memory,
          size_t size)
      : api_(runtime.api) {
    if (!size) return;
    runtime.check(api_->KernelContext_GetAllocator(context, memory, &allocator_));
    if (OrtStatus* status = api_->AllocatorAlloc(allocator_, size + 63, &block_)) {
      api_->ReleaseAllocator(allocator_);
      runtime.check(status);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (!allocator_) return;
    if (OrtStatus* status = api_->AllocatorFree(allocator_, block_)) api_->ReleaseStatus(status);
    api_->ReleaseAllocator(allocator_);
  }

  void* aligned() const {
    return block_ ? (char*)block_ + (64 - (uintptr_t)block_ % 64) % 64 : nullptr;
  }

 private:
  const OrtApi* api_;
  OrtAllocator* allocator_ = nullptr;
  void* block_ = nullptr;
};

// The session's own threads, as a zs_parallel_for.
struct Threads {
  const OrtApi* api;
  const OrtKernelContext* context;

  static void run(void* self, void (*task)(void*, size_t), size_t count, void* argument) {
    const Threads& threads = *(const Threads*)self;
    OrtStatus* status =
        threads.api->KernelContext_ParallelFor(threads.context, task, count, 0, argument);
    if (!status) return;
    threads.api->ReleaseStatus(status);
    for (size_t i = 0; i < count; i++) task(argument, i);
  }
};

// One node of a model. It never changes after it was made: any number of runs may share it.
class Kernel {
 public:
  Kernel(const Runtime& runtime, const OrtKernelInfo* info, const std::string& where)
      : runtime_(runtime), where_(where), memory_(nullptr, runtime.api->ReleaseMemoryInfo) {
    attributes_.rows = required(info, "N");
    attributes_.columns = required(info, "K");
    attributes_.block_size = optional(info, "block_size");
    attributes_.accuracy_level = optional(info, "accuracy_level");
    attributes_.layout = optional(info, "layout");
    read_environment();
    check_attributes();
    OrtMemoryInfo* memory = nullptr;
    runtime_.check(
        runtime_.api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_.reset(memory);
    pack_constants(info);
    read_constant_bias(info);
  }

  void compute(OrtKernelContext* context) const {
    const Tensor x = input(context, kX);
    const std::vector<int64_t>& shape = x.shape;
    if (shape.empty() || shape.back() != attributes_.columns)
      throw std::runtime_error("X has shape " + text(shape) + ", its last dimension must be K = " +
                               std::to_string(attributes_.columns));
    std::vector<int64_t> y_shape = shape;
    y_shape.back() = attributes_.rows;
    const int64_t m = rows_of(shape);
    std::unique_ptr<PackedWeight> made;
    if (!packed_) made = pack(context);
    const zs_linear* linear = (packed_ ? packed_ : made)->linear();

    const float* bias = bias_;
    std::vector<float> aligned_bias;
    if (!bias_is_constant_ && has_input(context, kBias))
      bias = read_bias(input(context, kBias), aligned_bias);

    OrtValue* output = nullptr;
    runtime_.check(runtime_.api->KernelContext_GetOutput(context, 0, y_shape.data(), y_shape.size(),
                                                         &output));
    void* y = nullptr;
    runtime_.check(runtime_.api->GetTensorMutableData(output, &y));
    if (m == 0 || attributes_.rows == 0) return;
    const Scratch scratch(runtime_, context, memory_.get(), zs_linear_workspace(linear, m));
    Threads threads = {runtime_.api, context};
    if (zs_linear_run(linear, (const float*)x.data, m, (float*)y, bias, scratch.aligned(),
                      Threads::run, &threads))
      throw std::bad_alloc();
  }

  OrtStatus* run(OrtKernelContext* context) const {
    return runtime_.guarded(where_, [&] { compute(context); });
  }

 private:
  int64_t required(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    runtime_.check(runtime_.api->KernelInfoGetAttribute_int64(info, name, &value));
    return value;
  }

  int64_t optional(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    OrtStatus* status = runtime_.api->KernelInfoGetAttribute_int64(info, name, &value);
    if (!status) return value;
    runtime_.api->ReleaseStatus(status);
    return 0;
  }

  // For tests, and to try out a layout without writing the model again.
  void read_environment() {
    if (const char* name = getenv("ZEROSKIP_INSTRUCTION_SET")) attributes_.instruction_set = name;
    const char* layout = getenv("ZEROSKIP_LAYOUT");
    if (!layout || !*layout) return;
    if (strcmp(layout, "0") != 0 && strcmp(layout, "1") != 0)
      throw std::runtime_error("ZEROSKIP_LAYOUT is '" + std::string(layout) + "', not 0 or 1");
    attributes_.layout = *layout - '0';
  }

  void check_attributes() const {
    const Attributes& a = attributes_;
    if (a.rows < 0 || a.columns < 0 || a.rows > kLargestSide || a.columns > kLargestSide)
      throw std::runtime_error("N = " + std::to_string(a.rows) + " and K = " +
                               std::to_string(a.columns) + " are not the sides of a weight");
    if (a.accuracy_level != 0 && a.accuracy_level != 4)
      throw std::runtime_error("accuracy_level is " + std::to_string(a.accuracy_level) +
                               ", it must be 0 or 4");
    if (a.layout != 0 && a.layout != 1)
      throw std::runtime_error("layout is " + std::to_string(a.layout) + ", it must be 0 or 1");
  }

  // Packs here when the weight is constant, which it is in every model that zeroskip writes.
  void pack_constants(const OrtKernelInfo* info) {
    WeightTensors tensors = {};
    tensors.has_scales = is_given(info, kScales);
    if (!constant(info, kBitmask, tensors.bitmask) ||
        !constant(info, kRowOffsets, tensors.row_offsets) ||
        !constant(info, kValues, tensors.values) ||
        (tensors.has_scales && !constant(info, kScales, tensors.scales)))
      return;
    packed_ = pack(tensors);
  }

  // A bias of zeros, there because the function body must have one, is left out.
  void read_constant_bias(const OrtKernelInfo* info) {
    Tensor bias;
    bias_is_constant_ = !is_given(info, kBias) || constant(info, kBias, bias);
    if (bias_is_constant_ && is_given(info, kBias)) {
      const float* values = read_bias(bias, aligned_bias_);
      const float* const end = values + attributes_.rows;
      if (std::any_of(values, end, [](float value) { return value != 0; })) bias_ = values;
    }
  }

  bool is_given(const OrtKernelInfo* info, Input input) const {
    size_t count = 0, size = 0;
    runtime_.check(runtime_.api->KernelInfo_GetInputCount(info, &count));
    if (input >= count) return false;
    runtime_.check(runtime_.api->KernelInfo_GetInputName(info, input, nullptr, &size));
    return size > 1;  // an absent input has an empty name; the size counts its terminator
  }

  bool constant(const OrtKernelInfo* info, Input input, Tensor& tensor) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    runtime_.check(
        runtime_.api->KernelInfoGetConstantInput_tensor(info, input, &is_constant, &value));
    if (!is_constant || !value) return false;
    tensor = view(runtime_, value);
    return true;
  }

  std::unique_ptr<PackedWeight> pack(const WeightTensors& tensors) const {
    const bool is_int8 = tensors.values.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    if (attributes_.accuracy_level == 4 && !is_int8)
      throw std::runtime_error("accuracy_level 4 goes with int8 values only");
    return std::unique_ptr<PackedWeight>(new PackedWeight(tensors, attributes_));
  }

  // Slow, and as safe: everything is checked again in each run.
  std::unique_ptr<PackedWeight> pack(const OrtKernelContext* context) const {
    WeightTensors tensors = {input(context, kBitmask), input(context, kRowOffsets),
                             input(context, kValues), Tensor(), has_input(context, kScales)};
    if (tensors.has_scales) tensors.scales = input(context, kScales);
    return pack(tensors);
  }

  bool has_input(const OrtKernelContext* context, Input index) const {
    size_t count = 0;
    runtime_.check(runtime_.api->KernelContext_GetInputCount(context, &count));
    if (index >= count) return false;
    const OrtValue* value = nullptr;
    runtime_.check(runtime_.api->KernelContext_GetInput(context, index, &value));
    return value != nullptr;
  }

  Tensor input(const OrtKernelContext* context, Input index) const {
    const OrtValue* value = nullptr;
    runtime_.check(runtime_.api->KernelContext_GetInput(context, index, &value));
    if (!value) throw std::runtime_error(std::string(kInputNames[index]) + " is missing");
    return view(runtime_, value);
  }

  const float* read_bias(const Tensor& bias, std::vector<float>& aligned) const {
    require(bias, kBias, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {attributes_.rows});
    if ((uintptr_t)bias.data % sizeof(float) == 0) return (const float*)bias.data;
    aligned.resize((size_t)attributes_.rows);
    memcpy(aligned.data(), bias.data, aligned.size() * sizeof(float));
    return aligned.data();
  }

  // All dimensions but the last. With K = 0 a shape can name more rows than memory could hold.
  static int64_t rows_of(const std::vector<int64_t>& shape) {
    int64_t product = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) {
      if (shape[i] == 0) return 0;
      if (product > std::numeric_limits<int64_t>::max() / shape[i])
        throw std::runtime_error("X of shape " + text(shape) + " is too large");
      product *= shape[i];
    }
    return product;
  }

  Runtime runtime_;
  std::string where_;
  Attributes attributes_;
  std::unique_ptr<OrtMemoryInfo, void(ORT_API_CALL*)(OrtMemoryInfo*)> memory_;
  bool bias_is_constant_ = false;
  const float* bias_ = nullptr;  // null: not constant, or nothing to add
  std::vector<float> aligned_bias_;
  std::unique_ptr<PackedWeight> packed_;  // null: an input of the weight is not constant
};

std::string describe(const Runtime& runtime, const OrtKernelInfo* info) {
  size_t size = 0;
  runtime.check(runtime.api->KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  if (size) runtime.check(runtime.api->KernelInfo_GetNodeName(info, &name[0], &size));
  return "SparseLinear '" + std::string(name.c_str()) + "'";
}

}  // namespace

OrtStatus* ORT_API_CALL create_kernel(const OrtCustomOp*, const OrtApi* api,
                                      const OrtKernelInfo* info, void** kernel) {
  const Runtime runtime = {api};
  *kernel = nullptr;
  std::string where;
  OrtStatus* status = runtime.guarded("SparseLinear", [&] { where = describe(runtime, info); });
  if (status) return status;
  return runtime.guarded(where, [&] { *kernel = new Kernel(runtime, info, where); });
}

OrtStatus* ORT_API_CALL run_kernel(void* kernel, OrtKernelContext* context) {
  return ((const Kernel*)kernel)->run(context);
}

void ORT_API_CALL destroy_kernel(void* kernel) { delete (Kernel*)kernel; }

}  // namespace zs
