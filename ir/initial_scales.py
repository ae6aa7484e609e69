"""Scales from the median and the mean of activations, before they are normalised."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zeroskip.ir.scale_groups import ScaleGroup

Moments = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def from_median_and_mean(
    group: ScaleGroup, moments: Moments, mean_weight: float, kappa: float
) -> torch.Tensor:
    """Returns ((median - mean_weight * mean)^2)^kappa of each channel, float64 [size].

    Sparsity Induction, eq. 5, with the identity or a rescaling for its g. Zero where the two agree:
    such a channel has no scale of its own.

    Args:
        group: The group.
        moments: Median and mean of the inputs, by linear.
        mean_weight: See above.
        kappa: 1 is the equation as published.
    """
    return (median_minus_mean(group, moments, mean_weight).square()).pow(kappa)


def median_minus_mean(group: ScaleGroup, moments: Moments, mean_weight: float) -> torch.Tensor:
    """Returns median - mean_weight * mean of each channel, averaged over consumers."""
    return _average(
        group, {n: median - mean_weight * mean for n, (median, mean) in moments.items()}
    )


def means(group: ScaleGroup, moments: Moments) -> torch.Tensor:
    """Returns the mean of each channel, averaged over consumers, float64 [size]."""
    return _average(group, {name: mean for name, (_, mean) in moments.items()})


def _average(group: ScaleGroup, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    counts = torch.zeros(group.size, dtype=torch.float64)
    for consumer in group.consumers:
        if consumer.linear in values:
            inside = consumer.exponents > 0
            channels = consumer.channels[inside]
            total.index_add_(0, channels, values[consumer.linear][inside])
            counts.index_add_(0, channels, torch.ones_like(total[channels]))
    return total / counts.clamp(min=1)
