"""Constants of an ONNX model as torch tensors."""

from __future__ import annotations

import onnx_ir
import torch


def to_torch(constant: onnx_ir.TensorProtocol) -> torch.Tensor:
    """Returns a copy of a constant; a file that it was read from is no longer mapped."""
    is_bfloat16 = constant.dtype == onnx_ir.DataType.BFLOAT16  # numpy has no such type of its own
    array = constant.numpy().view("int16") if is_bfloat16 else constant.numpy()
    tensor = torch.from_numpy(array.copy())
    if isinstance(constant, onnx_ir.ExternalTensor):
        del array
        constant.release()  # otherwise every weight that was read stays mapped
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
