// The kernel of a SparseLinear node, as the callbacks of an operator record.
#pragma once

#include "onnxruntime_abi.h"

namespace zs {

OrtStatus* ORT_API_CALL create_kernel(const OrtCustomOp* op, const OrtApi* api,
                                      const OrtKernelInfo* info, void** kernel);
OrtStatus* ORT_API_CALL run_kernel(void* kernel, OrtKernelContext* context);
void ORT_API_CALL destroy_kernel(void* kernel);

}  // namespace zs
