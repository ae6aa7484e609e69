"""find-scale-groups: which channel scales the program does not feel."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups, find_scale_groups
from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class FindScaleGroups(Pass):
    """Finds every group of channel scales under which the program computes the same.

    Derived from the dataflow alone: norms against the linears behind them, values against the
    output projection, queries against keys, one half of a gated MLP against the other, whatever
    the architecture is called. Nothing is changed; `fold-scales` uses it.

    Before::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]

    After::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact ScaleGroups
    """

    name = "find-scale-groups"
    provides = (ScaleGroups,)

    def run(self, program: Program) -> Program:
        return program.with_fact(find_scale_groups(program))
