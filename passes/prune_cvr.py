"""prune-cvr: keep the weights that are large for their column, with outlier channels held down."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PruneCVR(Pruner):
    """Scores a weight by its magnitude, the spread of its input channel, and that of its column.

    S_ij = |W_ij| * Var(x_j)^(1/4) * (Var_i(W_ij) + e)^(-alpha/2)

    Var(x_j) is over tokens, Var_i over the outputs, e is `epsilon` times the mean of Var_i. All of
    it is divided by a constant of the matrix, which moves no mask: variances count relative to their
    mean. Where none of them is above zero (a linear of one output; inputs that are all constant)
    that factor is 1.

    A channel whose input never changes scores 0, however large the input: it gives the same to every
    token, which `ShiftToBias` can put into the bias.

    Refuses a weight that holds NaN or inf, a linear without statistics, and comparison across linears.

    Args:
        alpha: 0 leaves the weights as they are, 1 standardises columns. The paper gives no value.
        epsilon: Least variance of a column, relative to the mean.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    Source: Yu et al., Statistical Correction, arXiv 2602.07375, channel-wise variance regularisation.
    """

    alpha: float = 1.0
    epsilon: float = 1e-8

    name = "prune-cvr"
    requires = (Statistics,)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = {
            "alpha": 0 <= self.alpha < float("inf"),
            "epsilon": 0 < self.epsilon < float("inf"),
        }
        self._refuse_unless(problems)

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        activity = _relative(program.fact(Statistics).of(linear.name).variance())
        columns = _relative(_column_variance(weight))
        factor = activity.pow(0.25) * (columns + self.epsilon).pow(-self.alpha / 2)
        return weight.abs() * factor.float()


def _column_variance(weight: torch.Tensor) -> torch.Tensor:
    """Var over the outputs, float64 [in]; differences are taken first, so that nothing cancels."""
    mean = weight.mean(0, dtype=torch.float64)
    return (weight - mean.float()).square().mean(0, dtype=torch.float64)


def _relative(variance: torch.Tensor) -> torch.Tensor:
    """Divides by the mean; ones where nothing varies at all."""
    mean = variance.mean()
    return variance / mean if mean > 0 else torch.ones_like(variance)
