// Checks the tensors of a SparseLinear node against each other and hands them to the kernels.
#include "onnxruntime_weight.h"

#include <cstring>
#include <stdexcept>

namespace zs {
namespace {

int32_t value_type(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return ZS_FLOAT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return ZS_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return ZS_BFLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return ZS_INT8;
    default:
      throw std::runtime_error("values must be float32, float16, bfloat16 or int8, not type " +
                               std::to_string((int)type));
  }
}

}  // namespace

void require(const Tensor& tensor, Input input, ONNXTensorElementDataType type,
             const std::vector<int64_t>& shape) {
  if (tensor.type != type)
    throw std::runtime_error(std::string(kInputNames[input]) + " has element type " +
                             std::to_string((int)tensor.type) + ", it must be " +
                             std::to_string((int)type));
  if (tensor.shape != shape)
    throw std::runtime_error(std::string(kInputNames[input]) + " has shape " + text(tensor.shape) +
                             ", it must be " + text(shape));
}

PackedWeight::PackedWeight(const WeightTensors& tensors, const Attributes& attributes) {
  const int64_t rows = attributes.rows, columns = attributes.columns;
  const int64_t words = (columns + 63) / 64;
  require(tensors.bitmask, kBitmask, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {rows, words * 8});
  require(tensors.row_offsets, kRowOffsets, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {rows + 1});
  if (tensors.values.shape.size() != 1)
    throw std::runtime_error("values has shape " + text(tensors.values.shape) +
                             ", it must have one dimension");
  zs_weight weight = {};
  weight.rows = rows;
  weight.columns = columns;
  weight.value_type = value_type(tensors.values.type);
  weight.bitmask = (const uint64_t*)in_place(tensors.bitmask, 1, 8);
  weight.bitmask_count = tensors.bitmask.count() / 8;
  weight.row_offsets = (const int64_t*)in_place(tensors.row_offsets, 8, 8);
  weight.row_offsets_count = tensors.row_offsets.count();
  const size_t size = weight.value_type == ZS_FLOAT32 ? 4 : weight.value_type == ZS_INT8 ? 1 : 2;
  weight.values = in_place(tensors.values, size, size);
  weight.values_count = tensors.values.count();
  weight.block_size = attributes.block_size;
  if (tensors.has_scales) read_scales(tensors.scales, weight);

  zs_options options = {};
  options.layout = (int32_t)attributes.layout;
  options.accuracy_level = (int32_t)attributes.accuracy_level;
  options.instruction_set = attributes.instruction_set.c_str();
  char message[ZS_MESSAGE_SIZE] = "";
  zs_linear* made = nullptr;
  if (zs_linear_create(&weight, &options, &made, message)) throw std::runtime_error(message);
  linear_.reset(made);
}

// The data where it is, so that a mapped file stays one; a copy when it is not aligned.
const void* PackedWeight::in_place(const Tensor& tensor, size_t element_size, size_t alignment) {
  if ((uintptr_t)tensor.data % alignment == 0) return tensor.data;
  const size_t size = (size_t)tensor.count() * element_size;
  copies_.emplace_back(new char[size]);
  memcpy(copies_.back().get(), tensor.data, size);
  return copies_.back().get();
}

// A function body that serves int8 and floating values multiplies both, so floats come with ones.
void PackedWeight::read_scales(const Tensor& scales, zs_weight& weight) {
  if (scales.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || scales.shape.size() != 2 ||
      scales.shape[0] != weight.rows)
    throw std::runtime_error("scales of type " + std::to_string((int)scales.type) + " and shape " +
                             text(scales.shape) + " must be float32 [" +
                             std::to_string(weight.rows) + ", blocks]");
  const float* data = (const float*)in_place(scales, 4, 4);
  if (weight.value_type == ZS_INT8) {
    weight.scales = data;
    weight.scales_count = scales.count();
    return;
  }
  for (int64_t i = 0; i < scales.count(); i++)
    if (data[i] != 1.0f)
      throw std::runtime_error("scales other than 1 go with int8 values only");
}

}  // namespace zs
