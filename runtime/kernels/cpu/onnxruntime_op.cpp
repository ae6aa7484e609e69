// The ONNX Runtime operator zeroskip::SparseLinear, version 1: its record and its registration.
#include <cstdint>
#include <cstring>
#include <forward_list>
#include <memory>
#include <mutex>

#include "onnxruntime_abi.h"
#include "onnxruntime_kernel.h"
#include "onnxruntime_runtime.h"
#include "onnxruntime_weight.h"
#include "sparse_linear.h"

namespace {

// The first version with KernelContext_ParallelFor; all else that is called is older.
constexpr uint32_t kApiVersion = 17;
constexpr const char* kOldestRuntime = "1.17";

const char* ORT_API_CALL op_name(const OrtCustomOp*) { return "SparseLinear"; }

const char* ORT_API_CALL op_provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }

ONNXTensorElementDataType ORT_API_CALL input_type(const OrtCustomOp*, size_t index) {
  switch (index) {
    case zs::kBitmask: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case zs::kRowOffsets: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case zs::kValues: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // one of four
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

OrtCustomOpInputOutputCharacteristic ORT_API_CALL input_kind(const OrtCustomOp*, size_t index) {
  return index == zs::kScales || index == zs::kBias ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

size_t ORT_API_CALL input_count(const OrtCustomOp*) { return zs::kInputCount; }

OrtMemType ORT_API_CALL input_memory(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }

ONNXTensorElementDataType ORT_API_CALL output_type(const OrtCustomOp*, size_t) {
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

OrtCustomOpInputOutputCharacteristic ORT_API_CALL output_kind(const OrtCustomOp*, size_t) {
  return INPUT_OUTPUT_REQUIRED;
}

size_t ORT_API_CALL output_count(const OrtCustomOp*) { return 1; }

int ORT_API_CALL one(const OrtCustomOp*) { return 1; }

// No InferOutputShapeFn: up to at least 1.23 the runtime crashes before it calls one when an
// optional input is absent. Shapes come from the model's value_info.
OrtCustomOp make_op() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetName = op_name;
  op.GetExecutionProviderType = op_provider;
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetInputCharacteristic = input_kind;
  op.GetInputMemoryType = input_memory;
  op.GetOutputType = output_type;
  op.GetOutputTypeCount = output_count;
  op.GetOutputCharacteristic = output_kind;
  op.GetVariadicInputMinArity = one;
  op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = one;
  op.GetVariadicOutputHomogeneity = one;
  op.CreateKernelV2 = zs::create_kernel;
  op.KernelComputeV2 = zs::run_kernel;
  op.KernelDestroy = zs::destroy_kernel;
  op.GetStartVersion = one;
  op.GetEndVersion = one;
  return op;
}

// The operator as one ONNX Runtime knows it; a process may hold several runtimes.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
};

// Sessions point into a domain for as long as they live, so each is made once and never freed.
OrtCustomOpDomain* domain_of(const zs::Runtime& runtime) {
  static std::mutex* const lock = new std::mutex;
  static std::forward_list<Registration>* const made = new std::forward_list<Registration>;
  static const OrtCustomOp op = make_op();
  const std::lock_guard<std::mutex> guard(*lock);
  for (const Registration& registration : *made)
    if (registration.api == runtime.api) return registration.domain;
  OrtCustomOpDomain* created = nullptr;
  runtime.check(runtime.api->CreateCustomOpDomain("zeroskip", &created));
  std::unique_ptr<OrtCustomOpDomain, void(ORT_API_CALL*)(OrtCustomOpDomain*)> domain(
      created, runtime.api->ReleaseCustomOpDomain);
  runtime.check(runtime.api->CustomOpDomain_Add(created, &op));
  made->push_front({runtime.api, created});
  return domain.release();
}

OrtStatus* refuse(const OrtApiBase* base) {
  const OrtApi* oldest = base->GetApi(1);
  if (!oldest) return nullptr;  // not even an error can be made; the operator stays unknown
  char message[200] = "zeroskip needs ONNX Runtime ";
  const char* version = base->GetVersionString();
  const std::size_t room = sizeof message - 1;
  strncat(message, kOldestRuntime, room - strlen(message));
  strncat(message, " or later (version 17 of its C API), this is ONNX Runtime ",
          room - strlen(message));
  strncat(message, version ? version : "of an unknown version", room - strlen(message));
  return oldest->CreateStatus(ORT_FAIL, message);
}

}  // namespace

// ONNX Runtime looks this name up in the library.
extern "C" ZS_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) return refuse(base);
  const zs::Runtime runtime = {api};
  return runtime.guarded("zeroskip", [&] {
    runtime.check(api->AddCustomOpDomain(options, domain_of(runtime)));
  });
}
