"""What each operator does with scales: one function for each kind of operator.

A rule takes labels for its arguments (`zeroskip.ir.scale_values`), adds the equations under which a
scale passes through the operator, and returns the labels of the result. An operator without a rule
allows no scale; so does a rule that raises `Refused`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from zeroskip.ir.scale_equations import broadcast, find_repeats, squeeze_repeats
from zeroskip.ir.scale_values import (
    Call,
    GainView,
    ParameterView,
    Refused,
    TooFewRows,
    Value,
    fixed,
)

if TYPE_CHECKING:
    from zeroskip.ir.label_flow import LabelFlow
    from zeroskip.ir.scale_flow import ScaleFlow

aten = torch.ops.aten
Rule = Callable[["ScaleFlow", Call], Value]

# Products with a stack of matrices, one for each expert: targets, and names of other libraries' own.
STACK_PRODUCTS = (aten.bmm.default, "grouped_mm", "_grouped_mm", "grouped_mm_fallback")


# How far sizes may be multiplied so that every expert gets a row.
MOST_GROWTH = 256


# Data movement: the operator itself runs, on labels.


def move(flow: LabelFlow, call: Call) -> Value:
    """Runs the operator itself on labels; a transposed parameter stays one."""
    source = call.args[0]
    if isinstance(source, ParameterView):
        order = _order(call, len(source.shape))
        if order is not None:
            return source.permuted(order)
        if call.node.target is aten.unbind.int and source.is_stack:
            return [_one_of(source, e) for e in range(source.shape[0])]
        if call.node.target is aten.select.int and source.is_stack and call.args[1] == 0:
            return _one_of(source, call.args[2])
    target: Any = call.node.target
    if target in (aten.view.default, aten._unsafe_view.default):
        target = aten.reshape.default
    labelled = [_labelled(flow, argument) for argument in call.args]
    kwargs = {k: v for k, v in call.kwargs.items() if k != "memory_format"}
    result = target(*labelled, **kwargs)
    if isinstance(result, (list, tuple)):
        return [find_repeats(item) for item in result]
    return find_repeats(result)


def _labelled(flow: LabelFlow, argument: Value) -> Value:
    if isinstance(argument, (torch.Tensor, ParameterView, GainView)):
        return flow.labels(argument)
    if isinstance(argument, (list, tuple)):
        return [_labelled(flow, item) for item in argument]
    return argument


def _order(call: Call, rank: int) -> list[int] | None:
    """The order of dimensions that a transposition makes; None for anything else."""
    order = list(range(rank))
    if call.node.target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if call.node.target is aten.mT.default:
        return [*order[:-2], rank - 1, rank - 2]
    if call.node.target in (aten.transpose.int, aten.swapaxes.default):
        i, j = call.args[1] % rank, call.args[2] % rank
        order[i], order[j] = order[j], order[i]
        return order
    if call.node.target is aten.permute.default:
        return [d % rank for d in call.args[1]]
    return None


def _one_of(stack: ParameterView, expert: int) -> ParameterView:
    """The matrix of one expert."""
    variables = {axis: v[expert] for axis, v in stack.variables.items()}
    if stack.axes[0] != 0:
        raise Refused("takes a part of a stack of matrices")
    return ParameterView(stack.name, stack.shape[1:], stack.axes[1:], variables)


def keep(flow: LabelFlow, call: Call) -> Value:
    """Casts and copies: the scale stays, unless the result is no longer a real number."""
    if not flow.is_float(call.node):
        if not isinstance(call.args[0], torch.Tensor) or bool(flow.labels(call.args[0]).any()):
            raise Refused("rounds")
        return fixed(flow.shape(call.node))
    return call.args[0]


# Element by element.


def _homogeneous(flow: ScaleFlow, call: Call) -> Value:
    """f(s x) = s f(x) for every s."""
    return flow.labels(call.args[0])


def _homogeneous_when_positive(flow: ScaleFlow, call: Call) -> Value:
    """f(s x) = s f(x) for s > 0, as ReLU."""
    labels = flow.labels(call.args[0])
    flow.equations.require_positive(labels)
    flow.refuse(list(call.args[1:]), f"it is a slope: {call.why}")  # PReLU's own parameter
    return labels


def _clamp(flow: ScaleFlow, call: Call) -> Value:
    bounds = [*call.node.args[1:], *call.node.kwargs.values()]
    if any(b not in (None, 0, math.inf, -math.inf) for b in bounds):
        raise Refused("has a bound that does not scale")
    return _homogeneous_when_positive(flow, call)


def _add(flow: ScaleFlow, call: Call) -> Value:
    first, second = call.args[0], call.args[1]
    if _is_number(first) or _is_number(second):
        return _add_number(flow, call)
    a, b = flow.labels(first), flow.labels(second)
    flow.equations.equate(a, b, call.why)
    return _either(a, b)


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
        flow.equations.pin(labels, f"a constant is added: {call.why}")
    return labels


def _multiply(flow: ScaleFlow, call: Call) -> Value:
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
    if call.node.args[0] is call.node.args[1]:
        raise Refused("squares")
    b = flow.labels(second)
    return flow.product(call, flow.labels(first), -b if divides else b)


def _where(flow: ScaleFlow, call: Call) -> Value:
    """A choice between two values of one scale."""
    if not flow.is_float(call.node):
        raise Refused("chooses")
    _, first, second = call.args
    for value, other, at in ((first, second, 2), (second, first, 1)):
        if _is_number(other):
            return _put(flow, call, flow.labels(value), call.node.args[at])
    a, b = flow.labels(first), flow.labels(second)
    flow.equations.equate(a, b, call.why)
    return _either(a, b).expand(flow.shape(call.node))


def _fill(flow: ScaleFlow, call: Call) -> Value:
    return _put(flow, call, flow.labels(call.args[0]), call.node.args[2])


def _put(flow: ScaleFlow, call: Call, labels: torch.Tensor, number: object) -> torch.Tensor:
    """Puts a number in some places: 0 has every scale, infinities have every positive one."""
    if number not in (0, math.inf, -math.inf):
        raise Refused("puts a constant in")
    if number != 0:
        flow.equations.require_positive(labels)
    return labels.expand(flow.shape(call.node))


def _either(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The labels of both, where two are to be equal: what is known of either."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    a, b = broadcast(squeeze_repeats(a), squeeze_repeats(b))
    return torch.where((a == 0) | (b == 0), 0, a).expand(shape)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Reductions and look-ups.


def _sum(flow: ScaleFlow, call: Call) -> Value:
    """Terms of one scale sum up to that scale."""
    labels = flow.labels(call.args[0])
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(labels.dim()))
    return flow.uniform(labels, dims, bool(call.argument(2, "keepdim", False)), call.why)


def _largest(flow: ScaleFlow, call: Call) -> Value:
    labels = _sum(flow, call)
    flow.equations.require_positive(labels)
    return labels


def _embedding(flow: ScaleFlow, call: Call) -> Value:
    table = call.args[0]
    if not isinstance(table, ParameterView) or len(table.shape) != 2:
        raise Refused("looks up in what is not a table of parameters")
    flow.equations.pin(table.along(0), f"rows are looked up: {call.why}")
    columns = flow.equations.canonical(table.along(1))
    return columns.expand(flow.shape(call.node))


def _index(flow: ScaleFlow, call: Call) -> Value:
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


def _take(flow: ScaleFlow, call: Call) -> Value:
    """index_select and gather along one dimension, with indices that may depend on the input."""
    labels = flow.labels(call.args[0])
    kept = flow.uniform(labels, [call.args[1]], keep=True, why=call.why)
    if call.node.target is aten.gather.default and bool(kept.any()):
        raise Refused("gathers")
    return kept.expand(flow.shape(call.node))


def _index_add(flow: ScaleFlow, call: Call) -> Value:
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


# Products.


def _linear(flow: ScaleFlow, call: Call) -> Value:
    bias = call.argument(2, "bias")
    return _times(flow, call, call.args[0], call.args[1], (1, 0), bias)


def _addmm(flow: ScaleFlow, call: Call) -> Value:
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


def _matmul(flow: ScaleFlow, call: Call) -> Value:
    first, second = call.args[:2]
    if isinstance(second, ParameterView):
        if second.is_stack:
            return _stacked(flow, call)
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


def _attention(flow: ScaleFlow, call: Call) -> Value:
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


def _stacked(flow: ScaleFlow, call: Call) -> Value:
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


def _grouped(flow: ScaleFlow, call: Call) -> Value:
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


def _convolution(flow: ScaleFlow, call: Call) -> Value:
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


def _normalize(flow: ScaleFlow, call: Call) -> Value:
    """Layer and RMS norms: no scale goes in, the gain's own comes out."""
    x, weight = call.args[0], call.argument(2, "weight")
    flow.equations.pin(flow.labels(x), f"it is normalised: {call.why}")
    has_bias = call.node.target is aten.layer_norm.default
    bias = call.argument(3, "bias") if has_bias else None
    gain = flow.labels(weight)
    if bias is not None:
        flow.equations.equate(gain, flow.labels(bias), call.why)
    return gain.expand(flow.shape(call.node))


def _fixed(flow: ScaleFlow, call: Call) -> Value:
    """Results that depend on the shapes of the arguments only."""
    return flow.fixed_value(call.node)


def _rules() -> dict[Any, Rule]:
    groups: Sequence[tuple[Rule, Sequence[Any]]] = (
        (move, MOVEMENTS),
        (
            keep,
            (
                "to",
                "_to_copy",
                "type_as",
                "float",
                "contiguous",
                "clone",
                "alias",
                "detach",
                "lift_fresh_copy",
                "lift_fresh",
            ),
        ),
        (_homogeneous, ("neg", "dropout", "feature_dropout")),
        (_homogeneous_when_positive, ("relu", "leaky_relu", "prelu", "abs")),
        (_clamp, (aten.clamp.default, aten.clamp_min.default)),
        (_add, ("add", "sub")),
        (_multiply, ("mul", "div", "true_divide")),
        (_where, ("where",)),
        (_fill, (aten.masked_fill.Scalar,)),
        (_sum, (aten.mean.dim, aten.sum.dim_IntList, aten.sum.default, aten.mean.default)),
        (_largest, (aten.amax.default, aten.amin.default)),
        (_embedding, (aten.embedding.default,)),
        (_index, (aten.index.Tensor,)),
        (_take, (aten.index_select.default, aten.gather.default)),
        (_index_add, (aten.index_add.default,)),
        (_linear, (aten.linear.default,)),
        (_addmm, (aten.addmm.default,)),
        (_matmul, (aten.matmul.default, aten.mm.default)),
        (_stacked, (aten.bmm.default,)),
        (_attention, (aten.scaled_dot_product_attention.default,)),
        (_grouped, ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")),
        (_convolution, (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)),
        (_normalize, (aten.layer_norm.default, aten.rms_norm.default)),
        (
            _fixed,
            (
                "ones_like",
                "zeros_like",
                "empty_like",
                "full_like",
                "new_zeros",
                "new_ones",
                "new_full",
                "new_empty",
                "rand_like",
                "_assert_tensor_metadata",
            ),
        ),
    )
    return {target: rule for rule, targets in groups for target in targets}


MOVEMENTS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.permute.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.view_as.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    aten.stack.default,
    aten.repeat.default,
    aten.tile.default,
    aten.repeat_interleave.self_int,
    aten.roll.default,
    aten.flip.default,
    aten.pixel_shuffle.default,
)

RULES: dict[Any, Rule] = _rules()
