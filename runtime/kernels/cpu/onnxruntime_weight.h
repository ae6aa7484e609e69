// The weight of a SparseLinear node, checked and made ready.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "onnxruntime_runtime.h"
#include "sparse_linear.h"

namespace zs {

enum Input : size_t { kX, kBitmask, kRowOffsets, kValues, kScales, kBias, kInputCount };
constexpr const char* kInputNames[kInputCount] = {"X",      "bitmask", "row_offsets",
                                                  "values", "scales",  "bias"};

// The tensors of a weight; scales may be absent.
struct WeightTensors {
  Tensor bitmask, row_offsets, values, scales;
  bool has_scales;
};

struct Attributes {
  int64_t rows = 0, columns = 0, block_size = 0, accuracy_level = 0, layout = 0;
  std::string instruction_set;  // empty: any
};

// Throws unless a tensor has this type and shape.
void require(const Tensor& tensor, Input input, ONNXTensorElementDataType type,
             const std::vector<int64_t>& shape);

// The tensors are used where they are, and have to outlive this; one that is not aligned to its
// elements is copied. Throws what zs_linear_create refuses.
class PackedWeight {
 public:
  PackedWeight(const WeightTensors& tensors, const Attributes& attributes);
  const zs_linear* linear() const { return linear_.get(); }

 private:
  struct Destroy {
    void operator()(zs_linear* linear) const { zs_linear_destroy(linear); }
  };

  const void* in_place(const Tensor& tensor, size_t element_size, size_t alignment);
  void read_scales(const Tensor& scales, zs_weight& weight);

  std::vector<std::unique_ptr<char[]>> copies_;
  std::unique_ptr<zs_linear, Destroy> linear_;
};

}  // namespace zs
