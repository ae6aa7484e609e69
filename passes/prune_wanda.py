"""prune-wanda: keep the weights that meet large activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import NM, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PruneWanda(Pruner):
    """Scores a weight by its magnitude times the size of its input channel.

    S_ij = |W_ij| * sqrt(E[x_j^2]), compared within each output row, each group of N:M, or each
    block sum. No weight changes: the masks are put into the facts.

    Refuses a weight that holds NaN or inf, a linear without statistics, and comparison across
    linears (activations of different layers are not of one scale).

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695, eq. 1 and section 3.
    """

    name = "prune-wanda"
    requires = (Statistics,)

    @property
    def ignores_input_scales(self) -> bool:
        """A column grows as its input shrinks; a row is compared with itself only."""
        pattern = parse_pattern(self.pattern)
        return isinstance(pattern, NM) or (
            isinstance(pattern, Unstructured) and pattern.comparison == "row"
        )

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() * program.fact(Statistics).of(linear.name).root_mean_square()
