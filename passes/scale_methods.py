"""How the scales of a group are chosen: from its activations, its weights, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import Consumer, ScaleGroup
from zeroskip.ir.statistics import EdgeStatistics, Statistics

Seen = list[tuple[Consumer, EdgeStatistics]]


def seen_consumers(program: Program, group: ScaleGroup) -> Seen:
    """Returns the consumers whose weights a group multiplies, and what calibration data gave them."""
    edges = program.fact(Statistics).edges
    found = [(c, edges[c.linear]) for c in group.consumers if c.linear in edges]
    return [(c, edge) for c, edge in found if edge.count and bool((c.exponents > 0).any())]


def activation_scales(group: ScaleGroup, seen: Seen) -> torch.Tensor | None:
    """Returns sqrt(E[x^2]) of each channel over all its tokens, float64; None without consumers.

    |W s| is then |W| * sqrt(E[x^2]): magnitude becomes Wanda's score.
    """
    if not seen:
        return None
    squares = torch.zeros(group.size, dtype=torch.float64)
    counts = torch.zeros(group.size, dtype=torch.float64)
    for consumer, edge in seen:
        inside = consumer.exponents > 0
        channels = consumer.channels[inside]
        squares.index_add_(0, channels, edge.total_of_squares[inside])
        counts.index_add_(0, channels, torch.full_like(squares[channels], edge.count))
    return rooted((squares / counts).sqrt(), group)


def smoothquant_scales(
    program: Program, group: ScaleGroup, seen: Seen, linears: Mapping[str, Linear], alpha: float
) -> torch.Tensor | None:
    """Returns max|x|^alpha / max|W|^(1 - alpha) of each channel, float64; None without consumers.

    Xiao et al., arXiv 2211.10438, equation 4; there weights are multiplied by it as here.
    """
    if not seen:
        return None
    inputs = torch.zeros(group.size, dtype=torch.float64)
    weights = torch.zeros(group.size, dtype=torch.float64)
    for consumer, edge in seen:
        inside = consumer.exponents > 0
        channels = consumer.channels[inside]
        columns = linears[consumer.linear].weight(program).abs().amax(0).double()
        inputs.scatter_reduce_(0, channels, edge.abs_max.double()[inside], "amax")
        weights.scatter_reduce_(0, channels, columns[inside], "amax")
    return rooted(inputs.pow(alpha) / weights.pow(1 - alpha), group)


def rooted(factors: torch.Tensor, group: ScaleGroup) -> torch.Tensor:
    """Returns the scales by which the weights of consumers are multiplied by some factors.

    They are the factors, but their roots where weights are multiplied by squares of scales.

    Args:
        factors: One for each channel, float64 [size].
        group: The group.
    """
    degree = torch.ones(group.size, dtype=torch.float64)
    for consumer in group.consumers:
        inside = consumer.exponents > 0
        exponents = consumer.exponents[inside].double()
        degree.scatter_reduce_(0, consumer.channels[inside], exponents, "amax")
    return torch.where(degree == 1, factors, factors.pow(1 / degree))


def equalizing_scales(program: Program, group: ScaleGroup) -> torch.Tensor | None:
    """Returns sqrt(range of what is divided / range of what is multiplied) of each channel, float64.

    Both then have the same range, the largest absolute value. Where squares of scales multiply or
    divide, the root is of a higher degree. None where a group has one side only.
    Nagel et al., arXiv 1906.04721, equation 11.
    """
    ranges = {sign: torch.zeros(group.size, dtype=torch.float64) for sign in (1, -1)}
    degrees = {sign: torch.ones(group.size, dtype=torch.float64) for sign in (1, -1)}
    for member in group.members:
        weight = program.weights[member.parameter].double()
        values = (member.slope * weight + member.offset).abs()
        if member.axis is not None:
            kept = {member.axis, 0} if member.stacked else {member.axis}
            rest = [axis for axis in range(weight.dim()) if axis not in kept]
            values = values.amax(rest) if rest else values
        for sign, largest in ranges.items():
            inside = member.exponents.sign() == sign
            channels, exponents = member.channels[inside], member.exponents[inside].abs().double()
            largest.scatter_reduce_(0, channels, values[inside], "amax")
            degrees[sign].scatter_reduce_(0, channels, exponents, "amax")
    if any(bool((largest == 0).all()) for largest in ranges.values()):
        return None
    dead = (ranges[1] == 0) | (ranges[-1] == 0)
    ratio, degree = ranges[-1] / ranges[1], degrees[-1] + degrees[1]
    return torch.where(
        dead, torch.nan, torch.where(degree == 2, ratio.sqrt(), ratio.pow(1 / degree))
    )


def normalized(scales: torch.Tensor, limit: float, power_of_two: bool = False) -> torch.Tensor:
    """Returns scales with a geometric mean of 1, then kept within [1 / limit, limit].

    A channel of scale 0 gets the lowest, one of infinity the largest, NaN the mean.

    Args:
        scales: Float64 [size], none below zero.
        limit: See above.
        power_of_two: Round each to the nearest power of two, in the exponent.
    """
    logarithm = scales.log2()
    usable = torch.isfinite(logarithm)
    if not bool(usable.any()):
        return torch.ones_like(scales)
    logarithm = (logarithm - logarithm[usable].mean()).nan_to_num(0.0, math.inf, -math.inf)
    bound = math.log2(limit)
    if power_of_two:
        return logarithm.round().clamp(-math.floor(bound), math.floor(bound)).exp2()
    return logarithm.clamp(-bound, bound).exp2()
