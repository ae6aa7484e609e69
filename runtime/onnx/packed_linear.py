"""The ONNX form of `zeroskip::sparse_linear`: a node zeroskip::SparseLinear, and its body in the model.

    sparse_linear(x, bitmask, row_offsets, values, scales, bias)
        ->  SparseLinear(X, bitmask, row_offsets, values, scales, bias)

The operands keep the names that they have among the weights; they are packed when they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.defs import OpSchema
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Op, Opset

import zeroskip.ir.ops  # noqa: F401  (registers the operator)
from zeroskip.ir.formats import count_blocks
from zeroskip.runtime.onnx.sparse_linear_function import (
    ATTRIBUTES,
    DOMAIN,
    INPUTS,
    OP,
    VERSION,
    function_body,
)

_WIDE = 1 << 31  # from as many values on, positions need 64 bits


def _schema() -> OpSchema:
    """What onnxscript has to know to record a node; the full description is in the documentation."""
    kind = OpSchema.FormalParameterOption
    inputs = [
        OpSchema.FormalParameter(
            name, f"T{i}", param_option=kind.Optional if i > 3 else kind.Single
        )
        for i, name in enumerate(INPUTS)
    ]
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    types += [f"tensor({name})" for name in ("int8", "uint8", "int64")]
    return OpSchema(
        OP,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("Y", "T0")],
        type_constraints=[(f"T{i}", types, "") for i in range(len(INPUTS))],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in ATTRIBUTES],
    )


_SPARSE_LINEAR = Op(Opset(DOMAIN, VERSION), OP, _schema())


def sparse_linear_translation() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Returns the onnxscript function of the operator, by operator."""
    return {torch.ops.zeroskip.sparse_linear.default: _sparse_linear}


def _sparse_linear(
    x: Any,
    bitmask: Any,
    row_offsets: Any,
    values: Any,
    scales: Any,
    bias: Any,
    in_features: int,
    block_size: int = 0,
    accuracy_level: int = 0,
    layout: int = 0,
) -> Any:
    rows = int(bitmask.shape[0])
    if bias is None:
        # A body cannot leave out an input that it reads.
        bias = op.Constant(value=onnx.numpy_helper.from_array(np.zeros(rows, np.float32)))
    return _SPARSE_LINEAR(
        x,
        bitmask,
        row_offsets,
        values,
        scales,
        bias,
        K=in_features,
        N=rows,
        block_size=block_size,
        accuracy_level=accuracy_level,
        layout=layout,
    )


def add_body(model: onnx_ir.Model) -> None:
    """Gives a model with SparseLinear nodes their body; leaves any other as it is.

    All nodes share one body. Where some have scales, the others get scales of 1.
    """
    nodes = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == (DOMAIN, OP)]
    if not nodes:
        return
    scaled = any(len(n.inputs) > 4 and n.inputs[4] is not None for n in nodes)
    for node in nodes if scaled else []:
        if node.inputs[4] is None:
            node.replace_input_with(4, _ones(model, node))
    body = function_body(
        opset=model.opset_imports[""],
        scales=scaled,
        accuracy_levels={node.attributes["accuracy_level"].as_int() for node in nodes},
        wide=any(_length(node.inputs[3]) >= _WIDE for node in nodes),
    )
    function = onnx_ir.from_proto(body)
    assert isinstance(function, onnx_ir.Function)
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION


def _length(values: onnx_ir.Value | None) -> int:
    size = values.shape[0] if values is not None and values.shape is not None else 0
    return size if isinstance(size, int) else 0


def _ones(model: onnx_ir.Model, node: onnx_ir.Node) -> onnx_ir.Value:
    shape = (
        node.attributes["N"].as_int(),
        count_blocks(node.attributes["K"].as_int(), node.attributes["block_size"].as_int()),
    )
    name = f"{node.inputs[1].name}.ones"  # type: ignore[union-attr]
    if name not in model.graph.initializers:
        tensor = onnx_ir.tensor(np.ones(shape, np.float32), name=name)
        model.graph.register_initializer(onnx_ir.Value(name=name, const_value=tensor))
    return model.graph.initializers[name]
