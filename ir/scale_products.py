"""What products, convolutions and norms do with scales: where they are taken up by parameters."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from zeroskip.ir.scale_elementwise import either
from zeroskip.ir.scale_equations import find_repeats
from zeroskip.ir.scale_values import Call, ParameterView, Refused, TooFewRows, Value, fixed

if TYPE_CHECKING:
    from zeroskip.ir.scale_flow import ScaleFlow

aten = torch.ops.aten

# Products with a stack of matrices, one for each expert: targets, and names of other libraries' own.
STACK_PRODUCTS = (aten.bmm.default, "grouped_mm", "_grouped_mm", "grouped_mm_fallback")
# How far sizes may be multiplied so that every expert gets a row.
MOST_GROWTH = 256


def linear(flow: ScaleFlow, call: Call) -> Value:
    """Multiplies by the transpose of a parameter: x W^T + b."""
    bias = call.argument(2, "bias")
    return _times(flow, call, call.args[0], call.args[1], (1, 0), bias)


def addmm(flow: ScaleFlow, call: Call) -> Value:
    """Multiplies by a parameter: b + x W."""
    bias, x, weight = call.args[:3]
    if call.kwargs:
        raise Refused("has factors of its own")
    return _times(flow, call, x, weight, (0, 1), bias)


def _times(
    flow: ScaleFlow, call: Call, x: Value, weight: Value, order: tuple[int, int], bias: Value
) -> torch.Tensor:
    """A product with a matrix parameter, whose dimensions `order` names: (in, out)."""
    if not isinstance(weight, ParameterView) or len(weight.shape) != 2 or weight.is_stack:
        raise Refused("multiplies by an expression of parameters")
    labels = flow.labels(x)
    columns = flow.channels(labels, call.why)
    flow.equations.equate(weight.along(order[0]), -columns, call.why)
    rows = flow.equations.canonical(weight.along(order[1]))
    if bias is not None:
        flow.equations.equate(rows, flow.labels(bias), call.why)
    return rows.expand(*labels.shape[:-1], len(rows))


def matmul(flow: ScaleFlow, call: Call) -> Value:
    """A product with a matrix parameter, with a stack of them, or of two activations."""
    first, second = call.args[:2]
    if isinstance(second, ParameterView):
        if second.is_stack:
            return multiply_stack(flow, call)
        return _times(flow, call, first, second, (0, 1), None)
    if isinstance(first, ParameterView):
        raise Refused("multiplies parameters from the left")
    return _contract(flow, call, flow.labels(first), flow.labels(second))


def _contract(flow: ScaleFlow, call: Call, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two activations: scales along the sum must cancel, or not vary along it."""
    if a.dim() < 2 or b.dim() < 2:
        raise Refused("multiplies vectors")
    a, b = flow.equations.canonical(a), flow.equations.canonical(b)
    along_a, along_b = a[..., :1], b[..., :1, :]
    if bool((a == along_a).all()) and bool((b == along_b).all()):
        return flow.product(call, along_a, along_b)
    columns = b.transpose(-1, -2)
    flow.equations.equate(a, a[..., :1, :], call.why)
    flow.equations.equate(columns, columns[..., :1, :], call.why)
    flow.equations.equate(a[..., :1, :], -columns[..., :1, :], call.why)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return fixed((*batch, a.shape[-2], b.shape[-1]))


def attend(flow: ScaleFlow, call: Call) -> Value:
    """softmax(q k^T + mask) v: logits keep their values; rows of weights sum the values up."""
    query, key, value = (flow.labels(argument) for argument in call.args[:3])
    mask = call.argument(3, "attn_mask")
    if mask is not None:
        flow.equations.pin(flow.labels(mask), f"it is added to logits: {call.why}")
    if call.argument(7, "enable_gqa", False):
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(repeats, -3)
    logits = _contract(flow, call, query, key.transpose(-1, -2))
    flow.equations.pin(logits, f"logits go through a softmax: {call.why}")
    rows = flow.uniform(value, [-2], keep=True, why=call.why)
    return find_repeats(rows.expand(flow.shape(call.node)))


def multiply_stack(flow: ScaleFlow, call: Call) -> Value:
    """Multiplies x [experts, tokens, in] by a stack [experts, in, out]."""
    x, stack = call.args[:2]
    if not isinstance(stack, ParameterView):
        return _matmul_of_activations(flow, call)
    if not stack.is_stack or stack.axes[0] != 0:
        raise Refused("multiplies by an expression of parameters")
    labels = flow.labels(x)
    if labels.dim() != 3:
        raise Refused("multiplies a stack of another rank")
    columns = flow.uniform(labels, [1], keep=False, why=call.why)
    flow.equations.equate(stack.along(1), -columns, call.why)
    rows = flow.equations.canonical(stack.along(2))
    return rows[:, None].expand(*labels.shape[:2], rows.shape[-1])


def _matmul_of_activations(flow: ScaleFlow, call: Call) -> Value:
    return _contract(flow, call, *(flow.labels(argument) for argument in call.args[:2]))


def add_product(flow: ScaleFlow, call: Call) -> Value:
    """A product that is added to something, batch by batch: both terms have one scale; one times 0 is not there."""
    added, x, z = call.args[:3]
    product: torch.Tensor = multiply_stack(flow, Call(call.node, (x, z), {}))
    if call.node.kwargs.get("beta") == 0:
        return product
    terms = flow.labels(added)
    flow.equations.equate(terms, product, call.why)
    return either(terms, product)


def multiply_groups(flow: ScaleFlow, call: Call) -> Value:
    """Rows of x, sorted by expert, times the matrix of their expert.

    Which rows go to which expert depends on the input. Here every expert gets some of them, and
    products with other offsets deal the rows out in another way; so does each `flow.deal`. What is
    equal under all of these is taken to be equal under any, as the experts' own scales can then
    only meet within one routing.
    """
    x, stack = call.args[:2]
    if not isinstance(stack, ParameterView) or not stack.is_stack or stack.axes[0] != 0:
        raise Refused("multiplies by an expression of parameters")
    if call.argument(3, "bias") is not None:
        raise Refused("adds a bias for each expert")
    labels, experts = flow.labels(x), stack.shape[0]
    offsets = call.node.args[2] if len(call.node.args) > 2 else call.node.kwargs.get("offs")
    if labels.dim() != 2 or not isinstance(offsets, fx.Node):
        raise Refused("multiplies without offsets")
    if labels.shape[0] < experts:
        if flow.growth >= MOST_GROWTH:
            raise Refused("gets too few rows to tell experts apart")
        raise TooFewRows(math.ceil(experts / max(labels.shape[0], 1)))
    flow.deals = 2
    expert = _deal(labels.shape[0], experts, f"{offsets.name} {flow.deal}")
    flow.equations.equate(flow.equations.canonical(stack.along(1))[expert], -labels, call.why)
    return find_repeats(flow.equations.canonical(stack.along(2))[expert])


def _deal(rows: int, experts: int, name: str) -> torch.Tensor:
    """Gives every expert some rows, in an order that belongs to a name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randperm(rows, generator=generator) % experts


def convolve(flow: ScaleFlow, call: Call) -> Value:
    """A convolution: channels are scaled, taps are not."""
    weight, bias = call.args[1], call.argument(2, "bias")
    if not isinstance(weight, ParameterView) or call.argument(6, "groups", 1) != 1:
        raise Refused("convolves in groups")
    labels = flow.labels(call.args[0])
    if labels.dim() != len(weight.shape):
        raise Refused("convolves without a batch")
    for axis in range(2, len(weight.shape)):
        flow.equations.pin(weight.along(axis), f"taps of a kernel: {call.why}")
    columns = flow.channels(labels.movedim(1, -1), call.why)
    flow.equations.equate(weight.along(1), -columns, call.why)
    rows = flow.equations.canonical(weight.along(0))
    if bias is not None:
        flow.equations.equate(rows, flow.labels(bias), call.why)
    shape = flow.shape(call.node)
    return rows.reshape(-1, *[1] * (len(shape) - 2)).expand(shape)


def normalize(flow: ScaleFlow, call: Call) -> Value:
    """Layer and RMS norms: no scale goes in, the gain's own comes out."""
    x, weight = call.args[0], call.argument(2, "weight")
    flow.equations.pin(flow.labels(x), f"it is normalised: {call.why}")
    has_bias = call.node.target is aten.layer_norm.default
    bias = call.argument(3, "bias") if has_bias else None
    gain = flow.labels(weight)
    if bias is not None:
        flow.equations.equate(gain, flow.labels(bias), call.why)
    return gain.expand(flow.shape(call.node))
