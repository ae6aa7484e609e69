"""What the tests of SparseLinear share: packed weights, models of one node, sessions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from onnx import helper as oh

from zeroskip.ir.formats import BitmaskWeight, count_blocks, pack_bitmask, spread_scales
from zeroskip.runtime.onnx.custom_ops import session_options
from zeroskip.runtime.onnx.sparse_linear import add_functions, make_sparse_linear

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def packed(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    density: float = 0.4,
    block_size: int = 0,
    seed: int = 0,
) -> BitmaskWeight:
    """Packs a random weight; int8 gets the scales that just fit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= density] = 0
    scales = None
    if dtype == torch.int8:
        blocks = count_blocks(columns, block_size)
        size = block_size or max(1, columns)
        padded = torch.zeros(rows, blocks * size)
        padded[:, :columns] = weight
        scales = padded.view(rows, blocks, size).abs().amax(2).clamp(min=1e-3) / 127
    return pack_bitmask(weight, dtype=dtype, scales=scales, block_size=block_size)


def model_of(
    weight: BitmaskWeight,
    *,
    rank: int = 3,
    bias: torch.Tensor | None = None,
    accuracy_level: int = 0,
    layout: int = 0,
    function: bool = True,
    opset: int = 18,
) -> onnx.ModelProto:
    """Returns a model whose only node is a SparseLinear from X to Y."""
    made = make_sparse_linear(
        weight, "X", "Y", name="fc", bias=bias, accuracy_level=accuracy_level, layout=layout
    )
    batch = [f"d{i}" for i in range(rank - 1)]
    graph = oh.make_graph(
        [made.node],
        "graph",
        [oh.make_tensor_value_info("X", TensorProto.FLOAT, [*batch, weight.columns])],
        [oh.make_tensor_value_info("Y", TensorProto.FLOAT, [*batch, weight.rows])],
        made.initializers,
    )
    imports = [oh.make_opsetid("", opset), oh.make_opsetid("zeroskip", 1)]
    model = oh.make_model(graph, opset_imports=imports, ir_version=9)
    if function:
        add_functions(model)
    return model


def session(
    model: onnx.ModelProto | Path | str,
    *,
    library: bool = True,
    threads: int = 1,
    optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Opens a model, with the kernels unless told otherwise."""
    options = session_options() if library else onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(opened: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    """Runs a model of one input and one output."""
    (y,) = opened.run(None, {"X": x})
    return np.asarray(y)


def inputs(*shape: int, seed: int = 1) -> np.ndarray:
    """Returns a random X, float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def quantized(x: np.ndarray) -> np.ndarray:
    """Rounds rows as accuracy_level 4 does, written apart from both implementations."""
    low = np.minimum(x.min(-1, keepdims=True), 0).astype(np.float64)
    high = np.maximum(x.max(-1, keepdims=True), 0).astype(np.float64)
    step = ((high - low) / 255).astype(np.float32)
    step[step == 0] = 1
    zero = np.clip(np.rint(-low.astype(np.float32) / step), 0, 255)
    return ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step).astype(np.float64)


def expected(
    weight: BitmaskWeight, x: np.ndarray, bias: torch.Tensor | None = None, level: int = 0
) -> np.ndarray:
    """Returns X W^T + bias in float64."""
    dense = np.zeros((weight.rows, weight.columns))
    dense[weight.keep().numpy()] = weight.values[: weight.kept].double().numpy()
    if weight.scales is not None:
        dense *= spread_scales(weight.scales.double(), weight.columns, weight.block_size).numpy()
    x64 = quantized(x) if level == 4 else x.astype(np.float64)
    return x64 @ dense.T + (0 if bias is None else bias.double().numpy())


def limit_of(dtype: torch.dtype) -> float:
    """What kernels may be off: with AMX, bfloat16 weights meet activations of 16 bits."""
    return 2.0**-16 if dtype == torch.bfloat16 else 2e-6


def close(found: np.ndarray, wanted: np.ndarray, limit: float = 2e-6) -> bool:
    """Compares relative to the largest number: sums of floats differ by their order."""
    scale = max(1.0, float(np.abs(wanted).max())) if wanted.size else 1.0
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=0, atol=limit * scale)
