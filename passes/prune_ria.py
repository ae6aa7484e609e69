"""prune-ria: keep the weights that are large for their row and for their column."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from zeroskip.ir.errors import RecipeError
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PruneRIA(Pruner):
    """Scores a weight by its share of its row and of its column, times the size of its input.

    S_ij = (|W_ij| / sum_k |W_ik| + |W_ij| / sum_k |W_kj|) * sqrt(E[x_j^2])^a, in float32. A row or
    a column of zeros has shares of 0. No weight changes: the masks are put into the facts.

    The published code compares within the whole matrix unless told otherwise; that is
    `50% matrix`, and `50%` compares within each row.

    Refuses a weight that holds NaN or inf, a linear without statistics, and comparison across
    linears.

    Args:
        a: Exponent of the size of the inputs; 0 leaves them out.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024 (https://openreview.net/forum?id=Tr0lPx9woF, on no arXiv), eq. 3.
    """

    a: float = 0.5

    name = "prune-ria"
    requires = (Statistics,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.a < math.inf:
            raise RecipeError(
                f"a={self.a} is out of range",
                pass_name=self.name,
                next_step="a finite exponent, 0 or more; 0.5 is the paper's",
            )

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        size = program.fact(Statistics).of(linear.name).root_mean_square()
        return relative_importance(weight) * size.pow(self.a)


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """Returns the share of each |w| in its row plus that in its column, float32 [out, in]."""
    size = weight.float().abs()
    shares = torch.zeros_like(size)
    for axis in (0, 1):
        # In float64 no sum of float32 numbers overflows. Zeros are divided by 1.
        total = size.sum(axis, keepdim=True, dtype=torch.float64)
        shares += size / torch.where(total > 0, total, 1.0)
    return shares
