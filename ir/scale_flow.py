"""Which scales a program does not feel: found by letting unknown scales flow through its graph.

Each axis of each parameter gets variables (`zeroskip.ir.scale_equations`): the unknown log-scales
of its channels. The graph is then run on labels instead of numbers. Operators that move data move
the labels, just so; those that compute say what must be equal or opposite for the output to change
by a scale alone; whatever is unknown allows no scale at all. What remains free is free for every
input: norm gains against the linears behind them, values against output projections through any
grouping of heads, queries against keys in the pairs that rotary embeddings demand.

No architecture is named. Fused projections, `1 + w` gains, repeated key heads and stacked experts
come out of the data movement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from zeroskip.ir.label_flow import LabelFlow
from zeroskip.ir.scale_equations import ScaleEquations, broadcast, squeeze_repeats
from zeroskip.ir.scale_products import STACK_PRODUCTS
from zeroskip.ir.scale_rules import RULES, WRITERS
from zeroskip.ir.scale_values import (
    Call,
    GainView,
    ParameterView,
    Value,
    VariableKey,
    fixed,
)

aten = torch.ops.aten


@dataclass
class ScaleFlow(LabelFlow):
    """Runs a program on the labels of scales until nothing new is learnt.

    Args:
        program: Without a KV cache: whatever leaves the graph cannot scale.
        growth: Multiplies every dynamic size of the example inputs.
        equations: What was found.
        variables: The variables of each parameter.
    """

    rules = RULES
    writers = WRITERS

    equations: ScaleEquations = field(default_factory=ScaleEquations)
    variables: dict[VariableKey, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._products: list[str] = []  # nodes that multiply two scales, both still free
        self._decided: set[str] = set()
        self.deal = self.deals = 1  # ways in which rows were, and are to be, dealt to experts
        while True:
            self._products = []
            self.run()
            if self.equations.solve():
                continue
            if self._products:
                self._decided.add(self._products[0])  # Its second factor shall not scale.
            elif self.deal < self.deals:
                self.deal += 1
            else:
                return

    def labels(self, value: Value) -> torch.Tensor:
        """Returns the labels of a tensor argument; reading a matrix by element pins its other axes."""
        if isinstance(value, GainView):
            self._pin_other_expressions(value)
            return self.equations.canonical(value.labels)
        if isinstance(value, ParameterView):
            last = value.axes[-1]
            for axis, variables in value.variables.items():
                if axis != last or value.is_stack:
                    self.equations.pin(variables, f"{value.name} is read element by element")
            if value.is_stack:
                return fixed(value.shape)
            return self.equations.canonical(value.variables[last]).expand(value.shape)
        if isinstance(value, torch.Tensor):
            return self.equations.canonical(value)
        return fixed(())

    def uniform(
        self, labels: torch.Tensor, dims: Sequence[int], keep: bool, why: str
    ) -> torch.Tensor:
        """Demands that labels not vary along some dimensions; returns them without these."""
        dims = sorted({d % labels.dim() for d in dims}, reverse=True)
        first = labels
        for d in dims:
            first = first.narrow(d, 0, min(1, first.shape[d]))
        self.equations.equate(labels, first, why)
        if not keep:
            for d in dims:
                first = first.squeeze(d)
        return first

    def channels(self, labels: torch.Tensor, why: str) -> torch.Tensor:
        """Demands that labels depend on the last dimension alone; returns these, [channels]."""
        if labels.dim() == 1:
            return labels
        return self.uniform(labels, range(labels.dim() - 1), keep=False, why=why)

    def product(self, call: Call, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Returns the labels of a product.

        Where both factors may scale and the product may not, they scale against each other; where
        all three may, the second factor is given up in the end.
        """
        a, b = broadcast(squeeze_repeats(first), squeeze_repeats(second))
        shape = np.broadcast_shapes(first.shape, second.shape)
        a, b = self.equations.canonical(a), self.equations.canonical(b)
        twice = (a == b) & (a != 0)
        both = (a != 0) & (b != 0) & (a != -b) & ~twice
        result = torch.where(a == 0, b, torch.where(b == 0, a, 0))
        if bool(twice.any()):
            result = torch.where(twice, self.equations.doubled(torch.where(twice, a, 0)), result)
        if bool(both.any()):
            result = torch.where(both, self._of_two(call, a, b, both), result)
        return result.expand(shape)

    def _of_two(
        self, call: Call, a: torch.Tensor, b: torch.Tensor, both: torch.Tensor
    ) -> torch.Tensor:
        """The labels of a product where both factors may scale."""
        name = call.node.name
        if name in self._decided:
            self.equations.pin(b[both], f"two free scales multiply: {call.why}")
            return a
        key = VariableKey(f"?{name} {tuple(both.shape)}", None)
        own = self.equations.canonical(self._variables(key, both.numel()).reshape(both.shape))
        held = both & (own == 0)
        self.equations.equate(a[held], -b[held], call.why)
        if not torch.equal(held, both):
            self._products.append(name)
        return own

    def view_scaled(self, gain: GainView, factor: float, offset: float) -> GainView:
        """Returns the view of `factor * gain + offset`."""
        slope, shift = gain.slope * factor, gain.offset * factor + offset
        labels = self._variables(_expression(gain.name, slope, shift), gain.labels.numel())
        return GainView(gain.name, slope, shift, labels.reshape(gain.shape))

    def _pin_other_expressions(self, gain: GainView) -> None:
        """Only one affine expression of a parameter can scale: what scales `w` bends `1 + w`."""
        own = _expression(gain.name, gain.slope, gain.offset)
        for key, variables in self.variables.items():
            if key.parameter == gain.name and key != own:
                self.equations.pin(variables, f"{gain.name} is read in two ways")

    def read_parameter(self, node: fx.Node) -> Value:
        name = str(node.target)
        shape = tuple(self.program.weights.source(name).shape)
        if len(shape) < 2 or shape[-1] == 1:
            labels = self._variables(VariableKey(name, None), torch.Size(shape).numel())
            if not shape:
                self.equations.pin(labels, f"{name} is a single number")
            return GainView(name, 1.0, 0.0, labels.reshape(shape))
        stacked = len(shape) == 3 and any(_is_stack_product(user) for user in _readers(node))
        axes = (1, 2) if stacked else range(len(shape))
        variables = {}
        for axis in axes:
            count = shape[0] * shape[axis] if stacked else shape[axis]
            found = self._variables(VariableKey(name, axis, stacked), count)
            variables[axis] = found.reshape(shape[0], -1) if stacked else found
        return ParameterView(name, shape, tuple(range(len(shape))), variables)

    def _variables(self, key: VariableKey, count: int) -> torch.Tensor:
        if key not in self.variables:
            self.variables[key] = self.equations.new_variables(count)
        return self.variables[key]

    def refuse(self, value: Value, why: str) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                self.refuse(item, why)
        elif isinstance(value, dict):
            self.refuse(list(value.values()), why)
        elif isinstance(value, ParameterView):
            for variables in value.variables.values():
                self.equations.pin(variables, why)
        elif isinstance(value, (torch.Tensor, GainView)):
            self.equations.pin(self.labels(value), why)


def _expression(parameter: str, slope: float, offset: float) -> VariableKey:
    """What the variables of an affine expression belong to; a mere multiple has the parameter's."""
    if offset == 0:
        return VariableKey(parameter, None)
    return VariableKey(parameter, None, slope=slope, offset=offset)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The operators that read a parameter, behind transposes and casts."""
    readers = []
    for user in node.users:
        moves = user.target in (aten.transpose.int, aten.permute.default, aten.mT.default)
        casts = getattr(user.target, "_opname", "") in ("to", "_to_copy", "contiguous", "clone")
        readers += _readers(user) if moves or casts else [user]
    return readers


def _is_stack_product(node: fx.Node) -> bool:
    return node.target in STACK_PRODUCTS or getattr(node.target, "_opname", "") in STACK_PRODUCTS
