"""Which targets could run a linear sparse once it is pruned, told from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from zeroskip.ir.input_groups import refusal_to_lower
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import NM
from zeroskip.ir.program import Program
from zeroskip.runtime.verdict_24 import refusal_of_shape

EXPERT = "its weight is 3-D, one matrix for each expert"
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TENSORRT_MULTIPLES = (8, 16)
"""Rows and columns that Model Optimizer and ASP ask for before they prune a weight to 2:4."""


def explain_cpu(linear: Linear, program: Program) -> str | None:
    """Returns why `zeroskip::SparseLinear` cannot run a linear in ONNX Runtime, or None."""
    if linear.expert is not None:
        return EXPERT
    dtype = program.weights.source(linear.parameter).dtype
    return None if dtype in _KERNEL_DTYPES else f"its weight is {dtype}, kernels compute in float32"


def explain_cuda(linear: Linear, program: Program) -> str | None:
    """Returns why `zeroskip::linear_24` cannot run a linear on a CUDA device, or None."""
    if linear.expert is not None:
        return EXPERT
    dtype = program.weights.source(linear.parameter).dtype
    return refusal_of_shape(linear.in_features, dtype) or refusal_to_lower(linear, program)


def explain_tensorrt(linear: Linear, program: Program) -> str | None:
    """Returns why TensorRT can take no 2:4 tactic for a linear in an ONNX file, or None."""
    if linear.expert is not None:
        return EXPERT
    return explain_tensorrt_shape(linear.shape)


def explain_tensorrt_shape(shape: tuple[int, int]) -> str | None:
    """Returns why TensorRT can take no 2:4 tactic for a weight [out, in], or None."""
    reason = NM(2, 4).refusal(shape)
    if reason is not None:
        return reason
    rows, columns = TENSORRT_MULTIPLES
    if shape[0] % rows or shape[1] % columns:
        return f"NVIDIA's tools take multiples of {rows} rows and {columns} columns only"
    return None


TARGETS: Mapping[str, Callable[[Linear, Program], str | None]] = {
    "onnxruntime-cpu": explain_cpu,
    "cuda 2:4": explain_cuda,
    "tensorrt 2:4": explain_tensorrt,
}
"""By name of the target what explains a refusal; None says that it can, not that it pays."""
