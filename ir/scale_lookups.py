"""What reductions and look-ups do with scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zeroskip.ir.scale_equations import find_repeats
from zeroskip.ir.scale_values import Call, ParameterView, Refused, Value, fixed

if TYPE_CHECKING:
    from zeroskip.ir.scale_flow import ScaleFlow

aten = torch.ops.aten


def sum_up(flow: ScaleFlow, call: Call) -> Value:
    """Terms of one scale sum up to that scale."""
    labels = flow.labels(call.args[0])
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(labels.dim()))
    return flow.uniform(labels, dims, bool(call.argument(2, "keepdim", False)), call.why)


def largest(flow: ScaleFlow, call: Call) -> Value:
    """The largest or the smallest of values of one scale."""
    labels = sum_up(flow, call)
    flow.equations.require_positive(labels)
    return labels


def embed(flow: ScaleFlow, call: Call) -> Value:
    """Rows of a table of parameters: one scale for all rows."""
    table = call.args[0]
    if not isinstance(table, ParameterView) or len(table.shape) != 2:
        raise Refused("looks up in what is not a table of parameters")
    flow.equations.pin(table.along(0), f"rows are looked up: {call.why}")
    columns = flow.equations.canonical(table.along(1))
    return columns.expand(flow.shape(call.node))


def index(flow: ScaleFlow, call: Call) -> Value:
    """Advanced indexing: literal where the indices are constants, else one scale for all rows."""
    source, indices = flow.labels(call.args[0]), call.args[1]
    if not bool(source.any()):
        return fixed(flow.shape(call.node))
    given = call.node.args[1]
    assert isinstance(given, (list, tuple))
    constants = [flow.constant(index) for index in given]
    if all((a is None) == (b is None) for a, b in zip(indices, constants, strict=True)):
        return find_repeats(aten.index.Tensor(source, constants))
    dims = _indexed(given)
    if dims != list(range(len(dims))):
        raise Refused("takes rows of an inner dimension")
    rest = flow.uniform(source, dims, keep=False, why=call.why)
    return rest.expand(flow.shape(call.node))


def _indexed(indices: Sequence[Any]) -> list[int]:
    """The dimensions that indices take; a mask takes as many as it has."""
    dims: list[int] = []
    position = 0
    for index in indices:
        value = index.meta["val"] if isinstance(index, fx.Node) else None
        taken = 1
        if value is not None and value.dtype in (torch.bool, torch.uint8):
            taken = value.dim()
        dims += range(position, position + taken) if index is not None else ()
        position += taken
    return dims


def take(flow: ScaleFlow, call: Call) -> Value:
    """index_select and gather along one dimension, with indices that may depend on the input."""
    labels = flow.labels(call.args[0])
    kept = flow.uniform(labels, [call.args[1]], keep=True, why=call.why)
    if call.node.target is aten.gather.default and bool(kept.any()):
        raise Refused("gathers")
    return kept.expand(flow.shape(call.node))


def index_add(flow: ScaleFlow, call: Call) -> Value:
    """Rows are added up at places that depend on the input: one scale for all rows."""
    target, dim, _, source = call.args[:4]
    rows = flow.uniform(flow.labels(source), [dim], keep=True, why=call.why)
    into = flow.labels(target)
    if not _is_zero(call.node.args[0]):
        flow.equations.equate(into, rows, call.why)
    return rows.expand(into.shape)


def _is_zero(node: object) -> bool:
    name = ""
    while isinstance(node, fx.Node):
        name = getattr(node.target, "_opname", "")
        if name not in ("to", "_to_copy"):
            break
        node = node.args[0]
    return name in ("zeros", "zeros_like", "new_zeros")
