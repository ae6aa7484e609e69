"""Least squares on a fixed support: the best values for the weights that a mask keeps.

    min over B of  tr((W - B) G (W - B)^T),    B zero wherever the mask is False

Rows are problems of their own, with one G for all. Conjugate gradients solve them together: each
step is one product with G, no row needs a factorisation, and no step makes an error larger.
"""

from __future__ import annotations

import torch

from zeroskip.ir.weights import zero_outside


def row_errors(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Returns d G d^T for each row d, float64 [out].

    Args:
        difference: Float32 [out, in].
        gram: Symmetric [in, in], positive semidefinite.
    """
    return (difference * (difference @ gram)).sum(1, dtype=torch.float64)


def refine_on_support(
    weight: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    start: torch.Tensor | None = None,
    steps: int = 10,
    tolerance: float = 1e-6,
) -> torch.Tensor:
    """Lowers the error of each row over the values that its mask keeps.

    The diagonal of G preconditions. Channels whose diagonal is zero keep what they start with.

    Args:
        weight: What the rows are to compute, float32 [out, in].
        keep: Boolean [out, in].
        gram: Symmetric [in, in], positive semidefinite.
        start: Where to start, [out, in]; default the weight itself. Zeroed outside the mask.
        steps: Of conjugate gradients; 0 returns the start.
        tolerance: A row stops when its gradient has fallen to this share of what it was.

    Returns:
        Float32 [out, in], zero outside the mask; no row has a larger error than the start.
    """
    start = zero_outside(weight if start is None else start, keep)
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    values = start.clone()
    residual = zero_outside((weight - values) @ gram, keep)
    direction = residual * inverse
    size = _dot(residual, direction)
    enough = size * tolerance**2
    for _ in range(steps):
        image = direction @ gram
        curvature = _dot(direction, image)
        active = (size > enough) & (curvature > 0)
        if not active.any():
            break
        length = torch.where(active, size / curvature, 0).float().unsqueeze(1)
        values.addcmul_(length, direction)
        residual = zero_outside(residual.addcmul_(length, image, value=-1), keep)
        conditioned = residual * inverse
        before, size = size, _dot(residual, conditioned)
        turn = torch.where(active, size / before, 0).float().unsqueeze(1)
        direction = conditioned.addcmul_(turn, direction)
    # Rounding may lift a row that was solved already.
    worse = row_errors(weight - values, gram) > row_errors(weight - start, gram)
    return torch.where(worse.unsqueeze(1), start, values)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1, dtype=torch.float64)
