"""Other forms of a dense ONNX model: our sparse operator, and the rivals' quantised operators."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from models.weights import constant_linears
from zeroskip.ir.formats import VALUE_TYPES, BitmaskWeight, pack_bitmask
from zeroskip.runtime.onnx.sparse_linear import add_functions, make_sparse_linear

NBITS_BLOCK = 32


def pack_values(weight: torch.Tensor, values: str) -> BitmaskWeight:
    """Packs what is not zero of a weight [rows, columns]; int8 values get a scale for each row."""
    if values != "int8":
        return pack_bitmask(weight, dtype=VALUE_TYPES[values])
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return pack_bitmask(weight, dtype=torch.int8, scales=scales)


def to_dynamic_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantisation: int8 weights, activations quantised at run time."""
    # The quantiser advises to run shape inference first; for MatMul it changes nothing.
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(_copy(model), str(source), save_as_external_data=True)
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=True,
        )
        return onnx.load(str(target))


def to_nbits(model: onnx.ModelProto, bits: Literal[4, 8]) -> onnx.ModelProto:
    """ONNX Runtime's MatMulNBits: blocks of 32, symmetric, activations rounded to int8."""
    quantizer = MatMulNBitsQuantizer(
        _copy(model), bits=bits, block_size=NBITS_BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def to_sparse(
    model: onnx.ModelProto,
    values: str,
    *,
    layout: int = 0,
    accuracy_level: int = 0,
    min_weights: int = 0,
) -> onnx.ModelProto:
    """Returns the model with every linear as one `SparseLinear`, its bias folded in.

    Args:
        model: Dense, with zeros in its weights (see `prune`).
        values: Type of the kept values.
        layout: 0 runs on the packed weight as it is, 1 repacks it when the session is made.
        accuracy_level: 4 rounds activations to 8 bits (int8 values only).
        min_weights: Smaller matrices stay dense.
    """
    made = _copy(model)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    for linear in list(constant_linears(made, min_weights)):
        # ONNX has W^T [columns, rows].
        weight = _tensor(tensors[linear.weight]).T.contiguous()
        last = linear.matmul if linear.add is None else linear.add
        sparse = make_sparse_linear(
            pack_values(weight, values),
            linear.matmul.input[0],
            last.output[0],
            name=linear.weight,
            bias=None if linear.bias is None else _tensor(tensors[linear.bias]),
            accuracy_level=accuracy_level,
            layout=layout,
        )
        for name in filter(None, (linear.weight, linear.bias)):
            made.graph.initializer.remove(tensors.pop(name))
        made.graph.initializer.extend(sparse.initializers)
        if linear.add is not None:
            made.graph.node.remove(linear.add)
        linear.matmul.CopyFrom(sparse.node)
    add_functions(made)
    return made


def sparse_linear_model(packed: BitmaskWeight, layout: int, accuracy_level: int) -> onnx.ModelProto:
    """One `SparseLinear` without a bias: input `x` [m, columns], `output` [m, rows]."""
    sparse = make_sparse_linear(
        packed, "x", "output", name="linear", accuracy_level=accuracy_level, layout=layout
    )
    graph = helper.make_graph(
        [sparse.node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", packed.columns])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["m", packed.rows])],
        sparse.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    add_functions(model)
    return model


def _tensor(proto: onnx.TensorProto) -> torch.Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(proto)))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
