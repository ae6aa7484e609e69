"""Which biases can be lowered, if the linears behind them make up for it in biases of their own.

A bias that is added to x reaches a linear W x + b unchanged when nothing but data movement and
averaging over tokens lies between: x - d goes in, and b + W d gives the same output. The labels
that flow here name the element of the bias that a value was raised by.

Attention averages where its weights sum up to 1. Those of fused attention may not, under a mask that
depends on the inputs: a token that may look at none, such as padding on the left, gets zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from zeroskip.ir.label_flow import LabelFlow
from zeroskip.ir.linears import find_linears
from zeroskip.ir.scale_equations import broadcast, find_repeats, squeeze_repeats
from zeroskip.ir.scale_movements import MOVEMENTS, keep, move
from zeroskip.ir.scale_values import Call, Refused, Value, fixed

aten = torch.ops.aten


@dataclass
class ShiftFlow(LabelFlow):
    """Runs a program once on the labels of shifts.

    Args:
        program: At level `captured`.
        growth: Multiplies every dynamic size of the example inputs.
        biases: The labels of each one-dimensional parameter, [size].
        arrivals: For each linear, the labels of its inputs, [in], at each of its uses.
        lost: Labels that reach something that feels a shift.
    """

    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    arrivals: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._next = 1
        self._linears: dict[fx.Node, str] = {}
        for linear in find_linears(self.program):
            if linear.expert is None:
                self._linears.update(dict.fromkeys((u.node for u in linear.uses), linear.name))
        self.run()

    def labels(self, value: Value) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else fixed(())

    def read_parameter(self, node: fx.Node) -> Value:
        name = str(node.target)
        shape = tuple(self.program.weights.source(name).shape)
        if len(shape) != 1:
            return fixed(shape)
        if name not in self.biases:
            self.biases[name] = torch.arange(self._next, self._next + shape[0])
            self._next += shape[0]
        return self.biases[name]

    def refuse(self, value: Value, why: str) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                self.refuse(item, why)
        elif isinstance(value, dict):
            self.refuse(list(value.values()), why)
        elif isinstance(value, torch.Tensor):
            self.lost.update(squeeze_repeats(value).flatten().tolist())

    def readers(self, linears: Iterable[str] | None = None) -> torch.Tensor:
        """Returns how many linears, of some or of all, each label arrives at, [labels + 1]."""
        count = torch.zeros(self._next, dtype=torch.long)
        for name in self.arrivals if linears is None else linears:
            count[torch.cat(self.arrivals[name])] += 1
        return count

    def arrive(self, call: Call, x: torch.Tensor) -> None:
        """Notes what comes to the inputs of a linear."""
        name = self._linears.get(call.node)
        if name is None:
            raise Refused("multiplies by an expression of parameters")
        columns = x
        for _ in range(x.dim() - 1):
            columns = columns[0]
        if not bool((squeeze_repeats(x) == columns).all()):
            raise Refused("rows are shifted unlike each other")
        self.arrivals.setdefault(name, []).append(columns)


def _pass(flow: ShiftFlow, call: Call) -> Value:
    return flow.labels(call.args[0])


def _add(flow: ShiftFlow, call: Call) -> Value:
    first, second = call.args[:2]
    a, b = broadcast(flow.labels(first), flow.labels(second))
    subtracts = "sub" in call.node.target._opname  # type: ignore[union-attr]
    if subtracts or call.kwargs:
        flow.refuse(b, call.why)
        b = torch.zeros_like(b)
    both = (a != 0) & (b != 0)
    if bool(both.any()):
        flow.refuse([a[both], b[both]], call.why)
    return find_repeats(torch.where(a != 0, a, b).expand(flow.shape(call.node)))


def _linear(flow: ShiftFlow, call: Call) -> Value:
    flow.arrive(call, flow.labels(call.args[0]))
    bias = call.argument(2, "bias")
    return flow.labels(bias).expand(flow.shape(call.node))


def _addmm(flow: ShiftFlow, call: Call) -> Value:
    flow.arrive(call, flow.labels(call.args[1]))
    return flow.labels(call.args[0]).expand(flow.shape(call.node))


def _matmul(flow: ShiftFlow, call: Call) -> Value:
    first, second = (flow.labels(argument) for argument in call.args[:2])
    if call.node in flow._linears:
        flow.arrive(call, first)
        return fixed(flow.shape(call.node))
    if not _is_average(call.node.args[0]):
        raise Refused("multiplies activations")
    return _averaged(flow, call, second)


def _attention(flow: ShiftFlow, call: Call) -> Value:
    query, key, value = (flow.labels(argument) for argument in call.args[:3])
    flow.refuse([query, key], call.why)
    mask = call.node.args[3] if len(call.node.args) > 3 else call.node.kwargs.get("attn_mask")
    if mask is not None and not _leaves_some(flow.constant(mask)):
        raise Refused("gives zeros where everything is masked")
    if call.argument(7, "enable_gqa", False):
        value = value.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return _averaged(flow, call, value)


def _leaves_some(mask: object) -> bool:
    """Whether a mask is known, for all inputs of these sizes, and hides no row entirely."""
    if not isinstance(mask, torch.Tensor):
        return False
    seen = mask if mask.dtype == torch.bool else mask > -math.inf
    return bool(seen.any(-1).all())


def _averaged(flow: ShiftFlow, call: Call, values: torch.Tensor) -> torch.Tensor:
    """A weighted mean of rows that were all shifted alike is shifted like each of them."""
    row = values[..., :1, :]
    if not bool((values == row).all()):
        raise Refused("tokens are shifted unlike each other")
    return find_repeats(row.expand(flow.shape(call.node)))


def _is_average(node: object) -> bool:
    """Whether the rows of a value sum up to one: a softmax, as it stands."""
    while isinstance(node, fx.Node):
        name = getattr(node.target, "_opname", "")
        if name in ("softmax", "_softmax"):
            value, dim = node.meta["val"], node.args[1]
            return dim in (-1, value.dim() - 1)
        if name not in ("dropout", "to", "_to_copy", "type_as"):
            return False
        node = node.args[0]
    return False


def _normalize(flow: ShiftFlow, call: Call) -> Value:
    flow.refuse([call.args[0], call.argument(2, "weight")], call.why)
    return flow.labels(call.argument(3, "bias")).expand(flow.shape(call.node))


def _fixed(flow: ShiftFlow, call: Call) -> Value:
    return flow.fixed_value(call.node)


_RULES: dict[Any, Callable[[Any, Call], Value]] = {
    **dict.fromkeys(MOVEMENTS, move),
    **dict.fromkeys(("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach"), keep),
    **dict.fromkeys(("dropout", "feature_dropout"), _pass),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("zeros_like", "ones_like", "new_zeros", "new_ones", "full_like"), _fixed),
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _normalize,
}
ShiftFlow.rules = _RULES
