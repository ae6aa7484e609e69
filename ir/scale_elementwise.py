"""What operators that work element by element do with scales."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from zeroskip.ir.scale_equations import broadcast, squeeze_repeats
from zeroskip.ir.scale_values import Call, GainView, Refused, Value

if TYPE_CHECKING:
    from zeroskip.ir.scale_flow import ScaleFlow


def homogeneous(flow: ScaleFlow, call: Call) -> Value:
    """f(s x) = s f(x) for every s."""
    return flow.labels(call.args[0])


def homogeneous_when_positive(flow: ScaleFlow, call: Call) -> Value:
    """f(s x) = s f(x) for s > 0, as ReLU."""
    labels = flow.labels(call.args[0])
    flow.equations.require_positive(labels)
    flow.refuse(list(call.args[1:]), f"it is a slope: {call.why}")  # PReLU's own parameter
    return labels


def square(flow: ScaleFlow, call: Call) -> Value:
    """x^2 has the square of the scale of x."""
    if len(call.node.args) > 1 and call.node.args[1] != 2:
        raise Refused("raises to a power other than 2")
    return flow.equations.doubled(flow.labels(call.args[0]))


def clamp(flow: ScaleFlow, call: Call) -> Value:
    """Bounds at 0 and at infinity: as ReLU."""
    bounds = [*call.node.args[1:], *call.node.kwargs.values()]
    if any(b not in (None, 0, math.inf, -math.inf) for b in bounds):
        raise Refused("has a bound that does not scale")
    return homogeneous_when_positive(flow, call)


def add(flow: ScaleFlow, call: Call) -> Value:
    """Sums and differences: both sides have one scale."""
    first, second = call.args[0], call.args[1]
    if _is_number(first) or _is_number(second):
        return _add_number(flow, call)
    a, b = flow.labels(first), flow.labels(second)
    flow.equations.equate(a, b, call.why)
    return either(a, b)


def _add_number(flow: ScaleFlow, call: Call) -> Value:
    signs = (1.0, -1.0 if "sub" in call.node.target._opname else 1.0)  # type: ignore[union-attr]
    at = 0 if _is_number(call.args[0]) else 1
    value, number = call.args[1 - at], call.args[at]
    # A size is another number for other inputs; `alpha` multiplies the second term.
    if not _is_number(call.node.args[at]) or call.kwargs:
        raise Refused("adds a number")
    if isinstance(value, GainView):
        return flow.view_scaled(value, signs[1 - at], number * signs[at])
    labels = flow.labels(value)
    if number != 0:
        # What is added to a mean of squares is a norm's epsilon.
        is_norm = getattr(call.node.args[1 - at], "target", None) is torch.ops.aten.mean.dim
        kind = "it is normalised" if is_norm else "a constant is added"
        flow.equations.pin(labels, f"{kind}: {call.why}")
    return labels


def multiply(flow: ScaleFlow, call: Call) -> Value:
    """Products and quotients: scales are multiplied and divided."""
    first, second = call.args[0], call.args[1]
    divides = "div" in call.node.target._opname  # type: ignore[union-attr]
    if call.kwargs.get("rounding_mode") is not None:
        raise Refused("rounds")
    if _is_number(second):
        # A size is another number for other inputs.
        if isinstance(first, GainView) and _is_number(call.node.args[1]) and second != 0:
            return flow.view_scaled(first, 1.0 / second if divides else second, 0.0)
        return flow.labels(first)
    if _is_number(first):
        if isinstance(second, GainView) and _is_number(call.node.args[0]) and not divides:
            return flow.view_scaled(second, first, 0.0)
        return -flow.labels(second) if divides else flow.labels(second)
    b = flow.labels(second)
    return flow.product(call, flow.labels(first), -b if divides else b)


def where(flow: ScaleFlow, call: Call) -> Value:
    """A choice between two values of one scale."""
    if not flow.is_float(call.node):
        raise Refused("chooses")
    _, first, second = call.args
    for value, other, at in ((first, second, 2), (second, first, 1)):
        if _is_number(other):
            return _put(flow, call, flow.labels(value), call.node.args[at])
    a, b = flow.labels(first), flow.labels(second)
    flow.equations.equate(a, b, call.why)
    return either(a, b).expand(flow.shape(call.node))


def fill(flow: ScaleFlow, call: Call) -> Value:
    """A number in the places of a mask."""
    return _put(flow, call, flow.labels(call.args[0]), call.node.args[2])


def _put(flow: ScaleFlow, call: Call, labels: torch.Tensor, number: object) -> torch.Tensor:
    """Puts a number in some places: 0 has every scale, infinities have every positive one."""
    if number not in (0, math.inf, -math.inf):
        raise Refused("puts a constant in")
    if number != 0:
        flow.equations.require_positive(labels)
    return labels.expand(flow.shape(call.node))


def either(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the labels of both, where two are to be equal: what is known of either."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    a, b = broadcast(squeeze_repeats(a), squeeze_repeats(b))
    return torch.where((a == 0) | (b == 0), 0, a).expand(shape)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
