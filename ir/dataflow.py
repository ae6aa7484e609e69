"""The dataflow of a Program: what each operator does to channels, what each node depends on."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from zeroskip.ir.program import Program

aten = torch.ops.aten

_MOVEMENTS = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.cat.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.index.Tensor,
    aten.index_select.default,
    operator.getitem,
}


def is_movement(node: fx.Node) -> bool:
    """Whether an operator only moves or casts values."""
    return node.target in _MOVEMENTS


def is_elementwise(node: fx.Node) -> bool:
    """Whether PyTorch tags an operator as element-wise."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_view(node: fx.Node) -> bool:
    """Whether a value may share memory with what it was made from."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return True  # Idle outside training: it then returns its input, which the schema hides.
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


@dataclass(frozen=True)
class Dependence:
    """What the nodes of a graph depend on.

    Args:
        constants: Depend on parameters, buffers and literals only.
        activations: Depend on input values and, through them, on a parameter.
        sides: Everything else that is computed: masks, positions, sizes.
    """

    constants: frozenset[fx.Node]
    activations: frozenset[fx.Node]
    sides: frozenset[fx.Node]


def find_dependence(program: Program) -> Dependence:
    """Sorts the nodes of a program into constants, activations and sides."""
    constants: set[fx.Node] = set()
    with_parameter: set[fx.Node] = set()
    from_input: set[fx.Node] = set()
    activations: set[fx.Node] = set()
    sides: set[fx.Node] = set()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            constants.add(node)
            if node.target in program.weights:
                with_parameter.add(node)
        elif node.op == "placeholder":
            sides.add(node)
            if isinstance(node.meta.get("val"), torch.Tensor):
                from_input.add(node)
        elif node.op != "output":
            if inputs and all(i in constants for i in inputs):
                constants.add(node)
                if any(i in with_parameter for i in inputs):
                    with_parameter.add(node)
                continue
            # Sizes are numbers, not values: what is computed from them is the same for any input.
            carries_value = not _is_size(node) and any(i in from_input for i in inputs)
            if carries_value:
                from_input.add(node)
            if carries_value and any(i in activations or i in with_parameter for i in inputs):
                activations.add(node)
            else:
                sides.add(node)
    return Dependence(frozenset(constants), frozenset(activations), frozenset(sides))


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
