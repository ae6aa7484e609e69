"""Turns a linear of an ONNX file from dense to sparse and back.

A linear that was made dense keeps in the metadata of its node how it was packed: its zeros are in
the dense weight, so it can be packed again, to the same values.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from zeroskip.ir.formats import VALUE_TYPES, BitmaskWeight, pack_bitmask
from zeroskip.runtime.onnx.sparse_linear import (
    attribute,
    make_sparse_linear,
    read_sparse_linear,
    to_proto,
    to_tensor,
)
from zeroskip.runtime.onnx.sparse_linear_function import INPUTS
from zeroskip.runtime.onnx.tunable import Tunable
from zeroskip.runtime.tuning import type_name

PACKING, SCALES = "zeroskip.packing", "zeroskip.scales"


@dataclass(frozen=True, eq=False)
class Packed:
    """What a linear computes with, packed.

    Args:
        weight: Its weight.
        bias: float32 [rows] or None.
        accuracy_level: 4 where activations are rounded to 8 bits.
        note: Why the values have this type, where that was chosen here.
    """

    weight: BitmaskWeight
    bias: torch.Tensor | None
    accuracy_level: int
    note: str = ""


def pack(model: ModelProto, linear: Tunable) -> Packed:
    """Returns a linear packed: as it is, as it once was, or in the narrowest type that is exact.

    Raises:
        ArtifactError: The constants of a SparseLinear contradict each other.
        LoweringError: A weight is not finite.
    """
    if linear.is_sparse:
        weight, bias = read_sparse_linear(model, linear.product)
        return Packed(weight, bias, attribute(linear.product, "accuracy_level"))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    dense = to_tensor(constants[linear.weight])
    dense = dense if linear.rows_first else dense.T.contiguous()
    bias = to_tensor(constants[linear.bias]) if linear.bias else None
    before = {item.key: item.value for item in linear.product.metadata_props}
    if PACKING in before:
        packed = _pack_as_before(dense, bias, before)
        if packed is not None:
            return packed
    values = dense[dense != 0]
    for name in ("bfloat16", "float16"):
        dtype = VALUE_TYPES[name]
        if torch.equal(values.to(dtype).float(), values):
            note = f"its values are exact in {name}"
            return Packed(pack_bitmask(dense, dtype=dtype), bias, 0, note)
    return Packed(pack_bitmask(dense), bias, 0)


def _pack_as_before(
    dense: torch.Tensor, bias: torch.Tensor | None, before: Mapping[str, str]
) -> Packed | None:
    """None where the weight was changed since, so that it does not fit its old form."""
    try:
        form = json.loads(before[PACKING])
        dtype, block_size = VALUE_TYPES[form["value_type"]], int(form["block_size"])
        level, scales = int(form["accuracy_level"]), None
        if dtype == torch.int8:
            raw = np.frombuffer(base64.b64decode(before[SCALES]), np.float32)
            scales = torch.from_numpy(raw.copy()).reshape(dense.shape[0], -1)
    except (KeyError, ValueError, TypeError):
        return None
    weight = pack_bitmask(dense, dtype=dtype, scales=scales, block_size=block_size)
    if not torch.equal(weight.unpack(), dense):
        return None
    return Packed(weight, bias, level)


def make_sparse(
    model: ModelProto, linear: Tunable, packed: Packed, layout: int, with_scales: bool
) -> Replacement:
    """Returns the nodes and constants of a linear of the model, packed."""
    made = make_sparse_linear(
        packed.weight,
        linear.x,
        linear.y,
        name=_free_prefix(model, linear),
        bias=packed.bias,
        accuracy_level=packed.accuracy_level,
        layout=layout,
        with_scales=with_scales,
    )
    made.node.name = linear.name
    return Replacement(linear, [made.node], made.initializers)


def make_dense(model: ModelProto, linear: Tunable, packed: Packed) -> Replacement:
    """Returns the nodes and constants of a linear of the model as a product, to be packed again."""
    weight, prefix = packed.weight, _free_prefix(model, linear)
    has_bias = packed.bias is not None and bool(packed.bias.any())
    out = f"{prefix}.product" if has_bias else linear.y
    product = helper.make_node("MatMul", [linear.x, f"{prefix}.weight"], [out], linear.name)
    form = {
        "value_type": type_name(weight),
        "block_size": weight.block_size,
        "accuracy_level": packed.accuracy_level,
    }
    product.metadata_props.add(key=PACKING, value=json.dumps(form))
    if weight.scales is not None:
        scales = base64.b64encode(weight.scales.numpy().tobytes()).decode()
        product.metadata_props.add(key=SCALES, value=scales)
    nodes = [product]
    constants = [to_proto(weight.unpack().T.contiguous(), f"{prefix}.weight")]
    if has_bias:
        assert packed.bias is not None
        name = f"{prefix}.bias"
        nodes.append(helper.make_node("Add", [out, name], [linear.y], f"{prefix}.add"))
        constants.append(to_proto(packed.bias.float(), name))
    return Replacement(linear, nodes, constants)


def _free_prefix(model: ModelProto, linear: Tunable) -> str:
    """The name of the linear, or one like it if the graph has other values called `<name>.bias`."""
    taken = {tensor.name for tensor in model.graph.initializer}
    taken.update(value.name for value in model.graph.input)
    taken.update(name for node in model.graph.node for name in node.output)
    taken -= {*linear.constants, linear.y}
    prefix, count = linear.name, 1
    while any(f"{prefix}.{part}" in taken for part in (*INPUTS[1:], "weight", "product")):
        count += 1
        prefix = f"{linear.name}.{count}"
    return prefix


@dataclass(frozen=True, eq=False)
class Replacement:
    """What stands for a linear from now on."""

    linear: Tunable
    nodes: list[NodeProto]
    constants: list[TensorProto]


def replace_linears(model: ModelProto, replacements: Sequence[Replacement]) -> None:
    """Puts nodes and constants in place of the old ones; changes the model."""
    # A node is known by its first output, which no other can have.
    by_output = {each.linear.product.output[0]: each for each in replacements}
    gone = {node.output[0] for each in replacements for node in each.linear.absorbed}
    dropped = {name for each in replacements for name in each.linear.constants}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in by_output:
            nodes += by_output[node.output[0]].nodes
        elif node.output[0] not in gone:
            nodes.append(_copy(node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    initializers = model.graph.initializer
    for i in reversed(range(len(initializers))):
        if initializers[i].name in dropped:
            del initializers[i]
    for each in replacements:
        initializers.extend(each.constants)
    left = {name for node in nodes for name in node.output}
    for i in reversed(range(len(model.graph.value_info))):
        if model.graph.value_info[i].name not in left:
            del model.graph.value_info[i]


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
