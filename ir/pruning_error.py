"""What pruning did to a linear: how far its output moved, and what its weights look like."""

from __future__ import annotations

import math

import torch

from zeroskip.ir.statistics import EdgeStatistics
from zeroskip.ir.weights import all_finite, count_nonzero

ROWS = 256
"""Outputs of a linear that its error is computed on: evenly spaced ones stand for the others."""
SAMPLES = 1 << 14
"""Weights of a linear that go into its histogram."""
BINS = 64
REACH = 4.0
"""A histogram reaches so many root mean squares to either side; what lies beyond is in the last bins."""


def output_error(before: torch.Tensor, after: torch.Tensor, edge: EdgeStatistics) -> float:
    """Returns ||x (W' - W)^T|| / ||x W^T|| over the calibration data, on `ROWS` of the outputs.

    Exact on those where the Gram matrix was recorded. Without it, inputs are taken as uncorrelated
    around their means.

    Args:
        before: W as [out, in].
        after: W' as [out, in].
        edge: What was seen of x.
    """
    chosen = _every(before.shape[0], ROWS)
    old = before[chosen].float()
    whole = _energy(old, edge)
    moved = _energy(after[chosen].float() - old, edge)
    return math.sqrt(moved / whole) if whole > 0 else 0.0


def _energy(weight: torch.Tensor, edge: EdgeStatistics) -> float:
    """Sum of squares of x W^T for a mean token."""
    count = max(edge.count, 1)
    if edge.gram is not None:
        return max(float((weight * (weight @ edge.gram)).sum(dtype=torch.float64)) / count, 0.0)
    exact = weight.double()
    means = (exact @ edge.mean()).square().sum()
    return float(means + (exact.square() @ edge.variance()).sum())


def sample_weights(weight: torch.Tensor) -> torch.Tensor:
    """Returns up to about `SAMPLES` weights, evenly spaced, as float32.

    The distance is odd: patterns repeat every 2, 4, 8 ... weights.
    """
    flat = weight.reshape(-1)
    return flat[:: max(flat.numel() // SAMPLES, 1) | 1].float()


def histogram(values: torch.Tensor, unit: float) -> list[int]:
    """Counts values in `BINS` bins between -REACH and REACH units; zeros are left out."""
    if not all_finite(values):
        values = values[~values.isnan()]
    # Several times as fast as torch.histc.
    inside = (values / max(unit, 1e-30)).clamp_(-REACH, REACH).add_(REACH)
    places = inside.mul_(BINS / (2 * REACH)).int().clamp_(max=BINS - 1)
    counts = torch.bincount(places, minlength=BINS)
    counts[BINS // 2] -= values.numel() - count_nonzero(values)
    found: list[int] = counts.tolist()
    return found


def root_mean_square(values: torch.Tensor) -> float:
    """Returns sqrt(E[w^2]); 0 of nothing."""
    return float(values.norm()) / math.sqrt(max(values.numel(), 1))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns ||after - before|| / ||before||."""
    whole = float(before.norm())
    return float((after - before).norm()) / whole if whole else 0.0


def _every(count: int, most: int) -> slice:
    return slice(None, None, max(-(-count // most), 1))
