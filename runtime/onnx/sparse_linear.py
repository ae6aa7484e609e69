"""The node zeroskip::SparseLinear: made from a packed weight, and read back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx import helper as oh

from zeroskip.ir.errors import ArtifactError, LoweringError
from zeroskip.ir.formats import PADDING, BitmaskWeight, count_blocks
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, INPUTS, OP, VERSION, function_body

TENSOR_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


@dataclass(frozen=True, eq=False)
class SparseLinearNode:
    """A node and the constants that it reads."""

    node: NodeProto
    initializers: list[TensorProto]


def is_sparse_linear(node: NodeProto) -> bool:
    """Tells whether a node is zeroskip::SparseLinear."""
    return node.domain == DOMAIN and node.op_type == OP


def make_sparse_linear(
    weight: BitmaskWeight,
    x: str,
    y: str,
    *,
    name: str,
    bias: torch.Tensor | None = None,
    accuracy_level: int = 0,
    layout: int = 0,
    with_scales: bool = False,
) -> SparseLinearNode:
    """Makes the node of a packed weight; its constants are called `<name>.bitmask` and so on.

    The bias is always there, of zeros when there is none: a body must not read an absent input.

    Args:
        weight: What to multiply by.
        x: The name of the input, float32 [..., columns].
        y: The name of the output, float32 [..., rows].
        name: Of the node, unique in its model.
        bias: float [rows].
        accuracy_level: 4 rounds each row of X to 8 bits; int8 values only.
        layout: 0 runs on the constants as they are stored; 1 repacks them for many tokens.
        with_scales: Adds scales of 1 to floating values: needed in a model that also has int8
            values, since all nodes share one body.

    Raises:
        LoweringError: accuracy_level or layout has a value that it cannot have.
    """
    is_int8 = weight.values.dtype == torch.int8
    if accuracy_level not in (0, 4) or (accuracy_level == 4 and not is_int8):
        raise LoweringError(
            f"accuracy_level is {accuracy_level} for {weight.values.dtype} values",
            where=name,
            next_step="use 0, or 4 with int8 values",
        )
    if layout not in (0, 1):
        raise LoweringError(f"layout is {layout}", where=name, next_step="use 0 or 1")
    scales = weight.scales
    if scales is None and with_scales:
        blocks = count_blocks(weight.columns, weight.block_size)
        scales = torch.ones(weight.rows, blocks)
    constants = {
        "bitmask": weight.bitmask,
        "row_offsets": weight.row_offsets,
        "values": weight.values,
        "scales": scales,
        "bias": torch.zeros(weight.rows) if bias is None else bias.detach().float(),
    }
    present = {part: tensor for part, tensor in constants.items() if tensor is not None}
    node = oh.make_node(
        OP,
        [x, *(f"{name}.{part}" if part in present else "" for part in INPUTS[1:])],
        [y],
        name=name,
        domain=DOMAIN,
        K=weight.columns,
        N=weight.rows,
        block_size=weight.block_size,
        # Nothing is rounded when there are no columns, and no runtime can take their maximum.
        accuracy_level=accuracy_level if weight.columns else 0,
        layout=layout,
    )
    return SparseLinearNode(
        node, [to_proto(tensor, f"{name}.{part}") for part, tensor in present.items()]
    )


def add_functions(model: ModelProto) -> None:
    """Gives a model with SparseLinear nodes its body and the imports of both domains.

    Args:
        model: Changed in place; a body that it already has is replaced.

    Raises:
        LoweringError: The model's opset is too old for the body.
    """
    nodes = [node for node in walk(model.graph) if is_sparse_linear(node)]
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    if not nodes:
        return
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    wide = any(sizes[node.input[3]][0] >= 1 << 31 for node in nodes if node.input[3] in sizes)
    body = function_body(
        opset=opset,
        scales=any(len(node.input) > 4 and node.input[4] for node in nodes),
        accuracy_levels={attribute(node, "accuracy_level") for node in nodes},
        wide=wide,
    )
    model.functions.append(body)
    if all(o.domain != DOMAIN for o in model.opset_import):
        model.opset_import.append(oh.make_opsetid(DOMAIN, VERSION))
    model.ir_version = max(model.ir_version, 8)  # the first with functions


def read_sparse_linear(
    model: ModelProto, node: NodeProto, folder: str | Path = ""
) -> tuple[BitmaskWeight, torch.Tensor | None]:
    """Returns the weight of a node and its bias.

    Args:
        model: Its main graph holds the node's constants.
        node: A zeroskip::SparseLinear.
        folder: Where external data lies.

    Raises:
        ArtifactError: A constant is missing, or they contradict each other.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(index: int) -> torch.Tensor | None:
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name not in constants:
            raise ArtifactError(
                f"{INPUTS[index]} of {node.name} is not a constant of the graph",
                where=name,
                next_step="only constant weights can be read",
            )
        return to_tensor(constants[name], folder)

    bitmask, offsets, values, scales, bias = (read(index) for index in range(1, 6))
    if bitmask is None or offsets is None or values is None:
        raise ArtifactError("a constant of a SparseLinear is missing", where=node.name)
    if values.dtype != torch.int8:
        scales = None
    weight = BitmaskWeight(
        bitmask, offsets, values, scales, attribute(node, "K"), attribute(node, "block_size")
    )
    check_weight(weight, attribute(node, "N"), node.name)
    return weight, bias


def check_weight(weight: BitmaskWeight, rows: int, where: str) -> None:
    """Refuses a weight whose tensors contradict each other.

    Raises:
        ArtifactError: Names the node and what does not fit.
    """
    words = -(-weight.columns // 64)
    blocks = count_blocks(weight.columns, weight.block_size)
    expected = {
        "bitmask": (weight.bitmask, torch.uint8, (rows, words * 8)),
        "row_offsets": (weight.row_offsets, torch.int64, (rows + 1,)),
        "scales": (weight.scales, torch.float32, (rows, blocks)),
    }
    for part, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise ArtifactError(
                f"{part} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}",
                where=where,
                next_step="export the model again",
            )
    counts = weight.keep().sum(1)
    # Compared row by row, so that no sum of hostile numbers can wrap to the right total.
    fits = (
        int(weight.row_offsets[0]) == 0
        and torch.equal(weight.row_offsets.diff(), counts)
        and weight.values.dim() == 1
        and weight.values.shape[0] >= int(counts.sum()) + PADDING
    )
    if not fits:
        raise ArtifactError(
            "the bitmask, the row offsets and the values contradict each other",
            where=where,
            next_step="export the model again",
        )


def attribute(node: NodeProto, name: str) -> int:
    """Returns an integer attribute, 0 when it is not there."""
    return next((a.i for a in node.attribute if a.name == name), 0)


def walk(graph: onnx.GraphProto) -> Iterable[NodeProto]:
    """Yields every node of a graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for item in node.attribute:
            for inner in [item.g, *item.graphs] if item.type in _GRAPHS else []:
                yield from walk(inner)


_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def to_proto(tensor: torch.Tensor, name: str) -> TensorProto:
    """Returns a tensor as a constant of a graph."""
    proto = TensorProto(name=name, data_type=TENSOR_TYPES[tensor.dtype], dims=tensor.shape)
    proto.raw_data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return proto


def to_tensor(proto: TensorProto, folder: str | Path = "") -> torch.Tensor:
    """Returns a constant of a graph as a tensor.

    Args:
        proto: Of a type that SparseLinear takes.
        folder: Where external data lies.

    Raises:
        ArtifactError: Its data is not there, or does not fit its shape and type.
    """
    try:
        array = numpy_helper.to_array(proto, str(folder))
    # A damaged file makes onnx raise whatever its numbers lead to, errors of its own among them.
    except Exception as error:
        raise ArtifactError(
            f"the constant cannot be read: {error}",
            where=proto.name,
            next_step="export the model again",
        ) from error
    if proto.data_type == TensorProto.BFLOAT16:  # numpy has no such type of its own
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
