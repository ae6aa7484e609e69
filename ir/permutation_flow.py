"""Which channels a program does not tell apart: found by letting their labels flow through its graph.

Each axis of each parameter gets labels, one for each of its entries. The graph is run on labels
instead of numbers, as for scales (`zeroskip.ir.scale_flow`), and operators say which labels must be
moved together: both factors of a gate, a bias with its row, a column with what comes to it. What
carries the same label must then be moved by one permutation. Unlike a scale, a permutation passes
through every function of single elements, GELU and SiLU among them.

Two channels can change places if everything treats them alike, so each label also has a signature:
how often it occurs in every value and parameter, and at which places along the dimensions where an
operator tells places apart (the heads of attention, say). Labels with equal signatures form a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from zeroskip.ir.dataflow import is_elementwise
from zeroskip.ir.scale_equations import ScaleEquations, broadcast, find_repeats, squeeze_repeats
from zeroskip.ir.scale_flow import ScaleFlow
from zeroskip.ir.scale_lookups import embed, index, index_add, take
from zeroskip.ir.scale_movements import MOVEMENTS, keep, move
from zeroskip.ir.scale_products import (
    addmm,
    convolve,
    linear,
    matmul,
    multiply_groups,
    multiply_stack,
)
from zeroskip.ir.scale_values import Call, ParameterView, Refused, Value, VariableKey, fixed

aten = torch.ops.aten

TOGETHER = (
    "its channels are reduced together, as norms do with those of the residual stream, which one "
    "permutation for the whole program would have to follow"
)
# Odd multipliers of a hash modulo 2^64.
_STEP, _PLACE, _COUNT = 6364136223846793005, 3202034522624059733, 1181783497276652981


class _Unsigned(ScaleEquations):
    """Equations between labels, which have no opposites."""

    def equate(self, first: torch.Tensor, second: torch.Tensor, why: str) -> None:
        # A reason is asked for where one of the two stays: what comes from there is given.
        given = f"it meets values that come in a given order: {why}"
        super().equate(_unsigned(first), _unsigned(second), given)


def _unsigned(labels: torch.Tensor) -> torch.Tensor:
    return squeeze_repeats(labels).abs().expand(labels.shape)


@dataclass
class PermutationFlow(ScaleFlow):
    """Runs a program on the labels of channels until nothing new is learnt.

    Args:
        program: At level `captured`.
        growth: Multiplies every dynamic size of the example inputs.
        equations: Which labels are moved together, and which stay where they are.
        variables: The labels of each parameter.
        signatures: What tells labels apart, int64 by label.
        parted: Why a label differs from others, by label: the first operator that says so.
    """

    equations: ScaleEquations = field(default_factory=_Unsigned)
    signatures: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    parted: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._signing = False
        self._signed = 0
        super().__post_init__()
        # Labels are final now: once more, to see where they occur.
        self._signing = True
        last = max((int(v.max()) for v in self.variables.values() if v.numel()), default=0)
        self.signatures = torch.zeros(last + 1, dtype=torch.long)
        self.run()
        for key, labels in self.variables.items():
            known = self.equations.canonical(labels)
            rows = known.reshape(self._stack_size(key), -1)
            for row in rows:
                self._sign(row, torch.full_like(row, _COUNT))

    def _stack_size(self, key: VariableKey) -> int:
        return int(self.program.weights.source(key.parameter).shape[0]) if key.stacked else 1

    def rule_of(self, node: fx.Node) -> Callable[[Any, Call], Value] | None:
        rule = super().rule_of(node)
        return elementwise if rule is None and is_elementwise(node) else rule

    def run(self) -> None:
        super().run()
        for node in self.program.graph.find_nodes(op="placeholder"):
            self.refuse(self.env[node], "it enters the program in a given order")

    def read_input(self, node: fx.Node) -> Value:
        """The channels of an input have labels too, to tell what else would move with them."""
        if not self.is_float(node) or node.meta["val"].dim() < 2:
            return self.fixed_value(node)
        shape = self.shape(node)
        key = VariableKey(f"?input {node.target}", None)
        return self.equations.canonical(self._variables(key, shape[-1])).expand(shape)

    def read_parameter(self, node: fx.Node) -> Value:
        name = str(node.target)
        shape = tuple(self.program.weights.source(name).shape)
        if len(shape) >= 2 and shape[-1] > 1:
            return super().read_parameter(node)
        count = torch.Size(shape).numel()
        if count == 1:
            return fixed(shape)
        return self.equations.canonical(self._variables(VariableKey(name, None), count).view(shape))

    def separate(self, labels: torch.Tensor, dims: Sequence[int], why: str) -> None:
        """Notes that an operator tells places along some dimensions apart.

        Args:
            labels: What is at these places.
            dims: Dimensions.
            why: The operator and the node.
        """
        kept = squeeze_repeats(labels)
        dims = [d % kept.dim() for d in dims if kept.shape[d % kept.dim()] > 1]
        if not self._signing or not dims:
            return
        places = torch.zeros((), dtype=torch.long)
        for d in dims:
            shape = [1] * kept.dim()
            shape[d] = kept.shape[d]
            places = places * kept.shape[d] + torch.arange(kept.shape[d]).view(shape)
        self._sign(kept, places.expand(kept.shape), mixed=True)
        for label in torch.unique(kept).tolist():
            self.parted.setdefault(label, f"{why}: tells its channels apart")

    def _sign(self, labels: torch.Tensor, places: torch.Tensor, mixed: bool = False) -> None:
        """Adds to the signature of each label where it occurs."""
        self._signed += 1
        found, which = torch.unique(labels.reshape(-1), return_inverse=True)
        hashes = places.reshape(-1)
        if mixed:
            hashes = (hashes + 1) * _PLACE
            hashes = (hashes ^ (hashes >> 29)) * _STEP
        total = torch.zeros(len(found), dtype=torch.long).index_add_(0, which, hashes)
        self.signatures[found] = (
            self.signatures[found] * _STEP + total + (self._signed * _PLACE) % 2**63
        )

    def _checked(
        self, node: fx.Node, rule: Callable[[Any, Call], Value] | None, call: Call
    ) -> Value:
        result = super()._checked(node, rule, call)
        if self._signing:
            for item in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(item, torch.Tensor):
                    kept = squeeze_repeats(self.equations.canonical(item))
                    if bool(kept.any()):
                        self._sign(kept, torch.full_like(kept, _COUNT))
        return result

    def tied(self, call: Call, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Moves what is at one place of several values together; returns the labels there.

        What a value without labels holds stays where it is: unless it is the same all along a
        dimension, it tells the places there apart.
        """
        rank = max(each.dim() for each in labels)
        full = [each.reshape((1,) * (rank - each.dim()) + tuple(each.shape)) for each in labels]
        kept = [squeeze_repeats(self.equations.canonical(each)) for each in full]
        result = torch.zeros((1,) * rank, dtype=torch.long)
        for each in kept:
            a, b = broadcast(result, each)
            both = (a != 0) & (b != 0)
            self.equations.equate(torch.where(both, a, 0), torch.where(both, b, 0), call.why)
            result = torch.where(a != 0, a, b)
        for each, whole in zip(kept, full, strict=True):
            if bool(((each == 0) & (result != 0)).any()):
                varying = [d for d in range(rank) if whole.shape[d] > 1]
                self.separate(result, varying, call.why)
        return result.expand(np.broadcast_shapes(*(tuple(each.shape) for each in full)))


def elementwise(flow: PermutationFlow, call: Call) -> Value:
    """A function of the elements at one place, the same at all places."""
    if torch.Tag.nondeterministic_seeded in call.node.target.tags:  # type: ignore[union-attr]
        raise Refused("is random")
    operands = [*call.args, *call.kwargs.values()]
    tensors = [v for v in operands if isinstance(v, (torch.Tensor, ParameterView))]
    labels = flow.tied(call, [flow.labels(value) for value in tensors])
    return labels.expand(flow.shape(call.node))


def _dropout(flow: PermutationFlow, call: Call) -> Value:
    if call.argument(2, "train"):
        raise Refused("is random")
    return flow.labels(call.args[0])


def _reduce(flow: PermutationFlow, call: Call) -> Value:
    labels = flow.labels(call.args[0])
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(labels.dim()))
    return _together(flow, call, labels, dims, bool(call.argument(2, "keepdim", False)))


def _together(
    flow: PermutationFlow, call: Call, labels: torch.Tensor, dims: Sequence[int], keepdim: bool
) -> torch.Tensor:
    """Takes values along some dimensions together; channels that lie along them stay."""
    first = labels
    for d in sorted({d % labels.dim() for d in dims}, reverse=True):
        if squeeze_repeats(labels).shape[d] > 1:
            flow.equations.pin(labels, f"{TOGETHER}: {call.why}")
        first = first.narrow(d, 0, 1) if keepdim else first.select(d, 0)
    return first


def _normalize(flow: PermutationFlow, call: Call) -> Value:
    labels = flow.labels(call.args[0])
    _together(flow, call, labels, range(-len(call.args[1]), 0), keepdim=True)
    with_bias = call.node.target is aten.layer_norm.default
    factors = [call.argument(2, "weight"), call.argument(3, "bias") if with_bias else None]
    return flow.tied(call, [labels, *(flow.labels(f) for f in factors if f is not None)])


def _product(flow: PermutationFlow, call: Call) -> Value:
    """A product with a matrix parameter, with a stack of them, or of two activations."""
    if any(isinstance(argument, ParameterView) for argument in call.args[:2]):
        stacked = call.node.target is aten.bmm.default
        return (multiply_stack if stacked else matmul)(flow, call)
    first, second = (flow.labels(argument) for argument in call.args[:2])
    return _contract(flow, call, first, second)


def _contract(flow: PermutationFlow, call: Call, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two activations: rows of one and columns of the other keep their places."""
    if a.dim() < 2 or b.dim() < 2:
        raise Refused("multiplies vectors")
    why = f"its channels are multiplied with each other: {call.why}"
    _pin_where_summed(flow, a, -1, why)
    _pin_where_summed(flow, b, -2, why)
    return flow.tied(call, [a[..., :1], b[..., :1, :]]).expand(flow.shape(call.node))


def _pin_where_summed(flow: PermutationFlow, labels: torch.Tensor, dim: int, why: str) -> None:
    if squeeze_repeats(labels).shape[dim] > 1:
        flow.equations.pin(labels, why)


def _attend(flow: PermutationFlow, call: Call) -> Value:
    """softmax(q k^T + mask) v: each head has weights of its own, and sums its values up by them."""
    query, key, value = (flow.labels(argument) for argument in call.args[:3])
    flow.refuse([query, key], f"queries and keys are multiplied with each other: {call.why}")
    mask = call.argument(3, "attn_mask")
    if mask is not None:
        flow.refuse(mask, f"it is added to logits: {call.why}")
    if call.argument(7, "enable_gqa", False):
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    _pin_where_summed(flow, value, -2, f"tokens are summed up: {call.why}")
    flow.separate(flow.equations.canonical(value), range(value.dim() - 2), call.why)
    return find_repeats(value[..., :1, :].expand(flow.shape(call.node)))


def _fixed(flow: PermutationFlow, call: Call) -> Value:
    return flow.fixed_value(call.node)


_RULES: dict[Any, Callable[[Any, Call], Value]] = {
    **dict.fromkeys(MOVEMENTS, move),
    **dict.fromkeys(
        (
            *("to", "_to_copy", "type_as", "float", "contiguous", "clone", "alias", "detach"),
            *("lift_fresh_copy", "lift_fresh"),
        ),
        keep,
    ),
    # Functions of elements that PyTorch does not tag as such.
    **dict.fromkeys(("where", "square", "true_divide", "clamp", "log_sigmoid"), elementwise),
    **dict.fromkeys(("dropout", "feature_dropout"), _dropout),
    **dict.fromkeys(
        (
            aten.mean.dim,
            aten.mean.default,
            aten.sum.dim_IntList,
            aten.sum.default,
            aten.amax.default,
            aten.amin.default,
        ),
        _reduce,
    ),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normalize),
    **dict.fromkeys(
        (
            *("ones_like", "zeros_like", "empty_like", "full_like"),
            *("new_zeros", "new_ones", "new_full", "new_empty", "_assert_tensor_metadata"),
        ),
        _fixed,
    ),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _product),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), multiply_groups),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolve),
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.embedding.default: embed,
    aten.index.Tensor: index,
    aten.index_select.default: take,
    aten.gather.default: take,
    aten.index_add.default: index_add,
    aten.scaled_dot_product_attention.default: _attend,
}
PermutationFlow.rules = _RULES
