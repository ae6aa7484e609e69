"""What pruning would cost a linear, told from its weight and the statistics of its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from zeroskip.ir.patterns import SparsityPattern, Unstructured, pruned_count
from zeroskip.ir.pruning_error import ROWS
from zeroskip.ir.weights import zero_outside


def output_errors(
    weight: torch.Tensor, gram: torch.Tensor, probes: Sequence[float], target: Unstructured
) -> tuple[float, ...]:
    """Returns tr(D G D^T) / tr(W G W^T) at each sparsity, D being the weights that Wanda prunes.

    Args:
        weight: float32 [out, in].
        gram: Sum of x x^T, float32 [in, in].
        probes: Sparsities, in (0, 1).
        target: What competes with what.

    Returns:
        One error for each probe; zeros for a linear whose output is zero.
    """
    scores = weight.abs() * gram.diagonal().clamp_min(0).sqrt()
    whole = _output_energy(weight, gram)
    if whole <= 0:
        return (0.0,) * len(probes)
    lines = scores.reshape(1, -1) if target.comparison == "matrix" else scores
    # One sort for all sparsities; stable, as the pruners' choice among equal scores.
    order = lines.argsort(dim=1, stable=True)
    lost = torch.zeros_like(weight)
    flat = lost.view(lines.shape)
    values = weight.reshape(lines.shape)
    done, errors = 0, []
    for probe in probes:
        count = pruned_count(probe, lines.shape[1])
        chosen = order[:, done:count]
        flat.scatter_(1, chosen, values.gather(1, chosen))
        done = count
        errors.append(max(_output_energy(lost, gram) / whole, 0.0))
    return tuple(errors)


def pattern_errors(
    weight: torch.Tensor, gram: torch.Tensor, patterns: Sequence[SparsityPattern]
) -> tuple[float, ...]:
    """Returns ||x D^T|| / ||x W^T|| for each pattern, D being the weights that Wanda prunes.

    Computed on up to `ROWS` outputs, evenly spaced, which stand for the others: patterns that
    compare within a row choose the same there.

    Args:
        weight: float32 [out, in].
        gram: Sum of x x^T, float32 [in, in].
        patterns: N:M, or shares of each row.

    Returns:
        One error for each; NaN where the pattern does not fit.
    """
    rows = weight[:: max(-(-weight.shape[0] // ROWS), 1)]
    scores = rows.abs() * gram.diagonal().clamp_min(0).sqrt()
    whole = _output_energy(rows, gram)
    errors = []
    for pattern in patterns:
        if pattern.refusal((rows.shape[0], rows.shape[1])) is not None:
            errors.append(math.nan)
            continue
        lost = zero_outside(rows, ~pattern.project(scores))
        errors.append(max(_output_energy(lost, gram) / whole, 0.0) ** 0.5 if whole > 0 else 0.0)
    return tuple(errors)


def _output_energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    return float((weight * (weight @ gram)).sum(dtype=torch.float64))


def error_curve(errors: Sequence[float], probes: Sequence[float], points: int) -> list[float]:
    """Returns the error at 0, 1 / points, ..., 1, between what was measured.

    Nothing pruned is no error, all pruned is 1. The least weights of a linear lie near zero about
    evenly, so their energy grows with the cube of the sparsity: cube roots are interpolated.
    """
    known = [(0.0, 0.0), *zip(probes, (e ** (1 / 3) for e in errors), strict=True), (1.0, 1.0)]
    found = []
    segment = 0
    for k in range(points + 1):
        x = k / points
        while x > known[segment + 1][0]:
            segment += 1
        (x0, y0), (x1, y1) = known[segment : segment + 2]
        found.append((y0 + (y1 - y0) * (x - x0) / (x1 - x0)) ** 3)
    return found


def outlier_share(scores: Sequence[torch.Tensor], threshold: float) -> float:
    """Returns the share of the scores of a layer above `threshold` times the mean of all of them.

    Args:
        scores: Of its linears, not negative.
        threshold: M of OWL.
    """
    count = sum(s.numel() for s in scores)
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / max(count, 1)
    return sum(int((s > threshold * mean).sum()) for s in scores) / max(count, 1)
