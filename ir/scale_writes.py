"""What writing into a part of a fresh tensor does with scales: the part takes those of what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zeroskip.ir.scale_equations import find_repeats
from zeroskip.ir.scale_values import Call, Refused, Value

if TYPE_CHECKING:
    from zeroskip.ir.label_flow import LabelFlow

aten = torch.ops.aten

# Operators whose result is nobody else's memory.
_FRESH = ("empty", "new_empty", "zeros", "new_zeros", "ones", "new_ones", "full", "new_full")
_PARTS = (aten.slice.Tensor, aten.narrow.default, aten.select.int)


def write(flow: LabelFlow, call: Call) -> Value:
    """Copies into a fresh tensor, or into a part of it that nothing else reads."""
    path = _path(call.node.args[0])
    base = path[0]
    if not flow.is_float(base):
        raise Refused("rounds")
    if not all(_is_earlier_write(user, call.node) for user in base.users):
        raise Refused("writes into what was read before")
    labels = flow.labels(flow.env[base]).clone(memory_format=torch.contiguous_format)
    part = labels
    for node in path[1:]:
        target: Any = node.target
        args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), flow.env.__getitem__)
        part = target(part, *args, **kwargs)
    part.copy_(flow.labels(call.args[1]))
    flow.env[base] = find_repeats(labels)
    return find_repeats(part)


def _path(node: object) -> list[fx.Node]:
    """The nodes from a fresh tensor to the part of it that is written, each read by the next alone."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node):
        path.insert(0, node)
        if getattr(node.target, "_opname", "") in _FRESH:
            return path
        if node.target not in _PARTS or len(node.users) > 1:
            break
        node = node.args[0]
    raise Refused("writes into its arguments")


def _is_earlier_write(user: fx.Node, write: fx.Node) -> bool:
    """Whether a reader of a fresh tensor comes after a write, or is the way to a write itself."""
    if user > write or not isinstance(user.meta.get("val"), torch.Tensor):
        return True
    while user.target in _PARTS and len(user.users) == 1:
        (user,) = user.users
    return user.target is aten.copy_.default and not user.users
