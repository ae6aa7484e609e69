"""How far each weight is from the mean of its matrix, after rows and columns were brought to length 1."""

from __future__ import annotations

import torch

# A spread below this is rounding: all entries of the normalised matrix are the same.
_NO_SPREAD = 1e-8


def z_importance(
    weight: torch.Tensor, base: float = 0.7, adaptation: float = 0.3, small: float = 0.1
) -> torch.Tensor:
    """Returns (a |z_row|^3 + (1 - a) |z_column|^3)^(1/3), with a = base (1 - adaptation * rho).

    z_row are the z-scores of the weight with rows of length 1, z_column with columns of length 1; mean
    and deviation are over the whole matrix. Rows and columns of zeros stay zeros.

    Args:
        weight: float32 [out, in], finite.
        base: Share of the rows where no weight is small.
        adaptation: How much of it goes over to the columns as weights become small.
        small: rho is the share of weights below this times the mean |w|.

    Returns:
        float32 [out, in]. The root keeps the order, and makes it grow like |w|: in float32 cubes
        of what is far out are as far apart as 1 and 10^9.
    """
    if weight.numel() == 0:
        return weight.abs()
    magnitude = weight.abs()
    mean = _total(magnitude) / weight.numel()
    rho = int((magnitude < small * mean).sum()) / weight.numel()
    share = base * (1 - adaptation * rho)
    rows = _z_scores(weight, 1).abs_().pow_(3).mul_(share)
    columns = _z_scores(weight, 0).abs_().pow_(3).mul_(1 - share)
    return rows.add_(columns).pow_(1 / 3)


def _z_scores(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Divides rows (dim 1) or columns (dim 0) by their lengths, and then standardises all entries."""
    lengths = torch.linalg.vector_norm(weight, dim=dim, keepdim=True, dtype=torch.float64)
    scaled: torch.Tensor = weight / lengths.float().clamp_min_(torch.finfo(torch.float32).tiny)
    count = scaled.numel()
    scaled -= _total(scaled) / count
    deviation = (_total(scaled.square()) / max(count - 1, 1)) ** 0.5
    return scaled.div_(max(deviation, _NO_SPREAD))


def _total(values: torch.Tensor) -> float:
    """The sum, row by row in float64, so that it does not depend on the number of threads."""
    return float(values.sum(1, dtype=torch.float64).sum())
