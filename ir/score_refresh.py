"""Scores under new scales from a diagonal that was measured once (Sparsity Induction, eq. 9 to 11).

The Hessian of a linear's squared error is H = E[x x^T]. Multiply the inputs by D = diag(d) and its
diagonal is multiplied by d^2: no calibration data has to run again.

Source: Jiang et al., "Sparsity Induction", arXiv 2602.21652.
"""

from __future__ import annotations

import torch


def refreshed_diagonal(diagonal: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns diag(E[x' x'^T]) for x' = factors * x (eq. 10).

    A fold of scales s multiplies the inputs by 1 / s.

    Args:
        diagonal: E[x^2], [in].
        factors: [in].
    """
    return diagonal * factors.square()


def refreshed_scores(
    weight: torch.Tensor, diagonal: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Returns |W| * sqrt(diag(H')) for the refreshed diagonal, [out, in] (eq. 11)."""
    return weight.abs() * (diagonal.sqrt() * factors.abs())
