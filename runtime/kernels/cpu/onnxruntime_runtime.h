// Calls into ONNX Runtime and what they return, for the operator.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

namespace zs {

// Calls into the runtime; what it refuses becomes an exception, and `guarded` a status again.
struct Runtime {
  const OrtApi* api;

  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw std::runtime_error(message);
  }

  // Runs body; no exception leaves, as the caller is C.
  template <typename Body>
  OrtStatus* guarded(const std::string& where, const Body& body) const {
    try {
      body();
      return nullptr;
    } catch (const std::bad_alloc&) {
      return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    } catch (const std::exception& error) {
      return fail(where, error.what());
    } catch (...) {
      return fail(where, "unknown error");
    }
  }

  OrtStatus* fail(const std::string& where, const char* problem) const noexcept {
    try {
      return api->CreateStatus(ORT_INVALID_ARGUMENT, (where + ": " + problem).c_str());
    } catch (...) {
      return api->CreateStatus(ORT_INVALID_ARGUMENT, problem);
    }
  }
};

struct Tensor {
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  void* data;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : shape) product *= size;
    return product;
  }
};

inline std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); i++)
    out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

inline Tensor view(const Runtime& runtime, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  runtime.check(runtime.api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(ORT_API_CALL*)(OrtTensorTypeAndShapeInfo*)>
      owned(info, runtime.api->ReleaseTensorTypeAndShapeInfo);
  Tensor tensor = {};
  size_t rank = 0;
  runtime.check(runtime.api->GetTensorElementType(info, &tensor.type));
  runtime.check(runtime.api->GetDimensionsCount(info, &rank));
  tensor.shape.resize(rank);
  runtime.check(runtime.api->GetDimensions(info, tensor.shape.data(), rank));
  // The C interface has no other way to the data of a constant; it is only read.
  runtime.check(runtime.api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

}  // namespace zs
