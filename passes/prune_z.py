"""prune-z: keep the weights that stand out of their row and of their column."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.z_scores import z_importance
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PruneZ(Pruner):
    """Scores a weight by its z-scores among normalised rows and columns, and by its input channel.

    With R = W, each row divided by its length, C = W, each column divided by its length, and z the
    z-score over the whole matrix:

    S_ij = ((a |z(R)_ij|^3 + (1 - a) |z(C)_ij|^3) * E[x_j^2]^(exponent / 2))^(1/3)

    a = base * (1 - adaptation * rho), rho the share of weights below `small` times the mean |w|.
    The published score is the cube of this one and gives the same order: within rows, matrices and
    groups of N:M the masks are the same. Block sums are of S, which grows like |W| as the other
    scores do; a sum of cubes would be that of each block's few largest weights. Multipliers from
    `SteerScores` are of S as well.

    The comparison is the pattern's own: "50%" is within each row; the public code compares within
    each matrix, "50% matrix", where whole rows may go. That code silently ignores N:M and knows no
    zero rows or columns; here N:M is N:M, and zero rows and columns score as the zeros they are:
    close to the mean.

    Refuses a weight that holds NaN or inf, a linear without statistics, and comparison across linears.

    Args:
        base: Share of the rows in the sum where no weight is small.
        adaptation: How much of it goes over to the columns as weights become small.
        exponent: Of the size of the input channel, in the published score.
        small: Below this times the mean |w|, a weight is small.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    Source: Z-Pruner, arXiv 2508.15828; the constants are those of its public code.
    """

    base: float = 0.7
    adaptation: float = 0.3
    exponent: float = 1.5
    small: float = 0.1

    name = "prune-z"
    requires = (Statistics,)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = {
            "base": 0 <= self.base <= 1,
            "adaptation": 0 <= self.adaptation <= 1,
            "exponent": 0 <= self.exponent < float("inf"),
            "small": 0 <= self.small < float("inf"),
        }
        self._refuse_unless(problems)

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        size = program.fact(Statistics).of(linear.name).root_mean_square()
        importance = z_importance(weight, self.base, self.adaptation, self.small)
        return importance.mul_(size.pow(self.exponent / 3))
