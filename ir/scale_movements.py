"""What data movement and copies do with scales: the operator itself runs, on labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zeroskip.ir.scale_equations import find_repeats
from zeroskip.ir.scale_values import Call, GainView, ParameterView, Refused, Value, fixed

if TYPE_CHECKING:
    from zeroskip.ir.label_flow import LabelFlow

aten = torch.ops.aten

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
