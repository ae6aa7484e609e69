// Runs a model with packed weights through ONNX Runtime's C API:
//
//     run_sparse MODEL LIBRARY K [ROWS]
//
// MODEL has one input X, float32 [..., K] of two dimensions, and one output Y. LIBRARY is what
// `python -c "import zeroskip; print(zeroskip.custom_ops_path())"` prints. Compiles against
// onnxruntime_c_api.h, or against zeroskip's onnxruntime_abi.h where those headers are not at hand.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#ifdef USE_ZEROSKIP_HEADER
#include "onnxruntime_abi.h"
#else
#include <onnxruntime_c_api.h>
#endif

namespace {

const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  std::exit(1);
}

// An object of the runtime that is released with its owner.
template <typename T>
using Owned = std::unique_ptr<T, void(ORT_API_CALL*)(T*)>;

std::basic_string<ORTCHAR_T> path(const char* text) {
  return std::basic_string<ORTCHAR_T>(text, text + std::string(text).size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL LIBRARY K [ROWS]\n", argv[0]);
    return 2;
  }
  const int64_t columns = std::atoll(argv[3]), rows = argc > 4 ? std::atoll(argv[4]) : 1;

  const OrtApiBase* base = OrtGetApiBase();
  api = base->GetApi(17);
  if (!api) {
    std::fprintf(stderr, "ONNX Runtime %s is older than 1.17\n", base->GetVersionString());
    return 1;
  }

  OrtEnv* env = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "run_sparse", &env));
  const Owned<OrtEnv> owned_env(env, api->ReleaseEnv);

  OrtSessionOptions* options = nullptr;
  check(api->CreateSessionOptions(&options));
  const Owned<OrtSessionOptions> owned_options(options, api->ReleaseSessionOptions);
  check(api->SetIntraOpNumThreads(options, 2));
  // The one line that makes packed weights fast.
  check(api->RegisterCustomOpsLibrary_V2(options, path(argv[2]).c_str()));

  OrtSession* session = nullptr;
  check(api->CreateSession(env, path(argv[1]).c_str(), options, &session));
  const Owned<OrtSession> owned_session(session, api->ReleaseSession);

  OrtMemoryInfo* memory = nullptr;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  const Owned<OrtMemoryInfo> owned_memory(memory, api->ReleaseMemoryInfo);

  std::vector<float> x((size_t)(rows * columns));
  for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i % 7) - 3;
  const int64_t shape[] = {rows, columns};
  OrtValue* input = nullptr;
  check(api->CreateTensorWithDataAsOrtValue(memory, x.data(), x.size() * sizeof(float), shape, 2,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
  const Owned<OrtValue> owned_input(input, api->ReleaseValue);

  const char* const input_names[] = {"X"};
  const char* const output_names[] = {"Y"};
  const OrtValue* const inputs[] = {input};
  OrtValue* output = nullptr;
  check(api->Run(session, nullptr, input_names, inputs, 1, output_names, 1, &output));
  const Owned<OrtValue> owned_output(output, api->ReleaseValue);

  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(output, &info));
  const Owned<OrtTensorTypeAndShapeInfo> owned_info(info, api->ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> y_shape(rank);
  check(api->GetDimensions(info, y_shape.data(), rank));
  size_t count = 1;
  for (int64_t size : y_shape) count *= (size_t)size;

  void* y = nullptr;
  check(api->GetTensorMutableData(output, &y));
  for (size_t i = 0; i < count; i++) std::printf("%.9g\n", ((const float*)y)[i]);
  return 0;
}
