"""Folding a shift of activations into biases: what produces them is lowered, what reads them makes up."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zeroskip.ir.biases import find_bias, refusal_to_shift
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup
from zeroskip.ir.statistics import Statistics


def why_not_shifted(
    program: Program, group: ScaleGroup, linears: Mapping[str, Linear]
) -> str | None:
    """Returns why the inputs of a group's consumers cannot be shifted, or None when they can.

    Args:
        program: The program that the group was found in.
        group: The group.
        linears: All linears of the program, by name.
    """
    if not group.shifts:
        return "no bias shifts every channel of it"
    readers = [linears[consumer.linear] for consumer in group.consumers]
    for linear in readers:
        if not _biases(program, linear):
            return f"{linear.name} has no bias to make up for a shift"
        if reason := refusal_to_shift(linear, program):
            return f"{linear.name}: {reason}"
    names = [name for linear in readers for name in _biases(program, linear)]
    names += [shift.parameter for shift in group.shifts]
    return "a bias of it is read twice" if len(set(names)) < len(names) else None


def _biases(program: Program, linear: Linear) -> tuple[str, ...]:
    """The biases of a linear, one for each use that differs; none when a use has none."""
    found = [find_bias(use, program) for use in linear.uses]
    return () if None in found else tuple(dict.fromkeys(name for name in found if name))


def shifted_biases(
    program: Program,
    group: ScaleGroup,
    shift: torch.Tensor,
    linears: Mapping[str, Linear],
    lost: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Returns what pruning after a shift adds to each bias, over pruning without it.

    (W * M)(x - d) + b + W d = (W * M) x + b + (W - W * M) d, so a shift is a correction of biases.

    Args:
        program: The program that the group was found in.
        group: The group that is shifted.
        shift: d, by channel, [size].
        linears: By name; those that are not pruned lose nothing.
        lost: By linear, W - W * M, [out, in].
    """
    added: dict[str, torch.Tensor] = {}
    for consumer in group.consumers:
        if consumer.linear not in lost:
            continue
        gain = lost[consumer.linear] @ _of_inputs(shift, consumer.channels)
        for name in _biases(program, linears[consumer.linear]):
            added[name] = gain
    return added


def _of_inputs(shift: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    chosen = shift.index_select(0, channels.clamp(min=0))
    return torch.where(channels >= 0, chosen, torch.zeros_like(chosen))


def fold_shift(
    program: Program, group: ScaleGroup, shift: torch.Tensor, linears: Mapping[str, Linear]
) -> Program:
    """Returns the program with the inputs of a group's consumers lowered by a shift.

    Exact: the biases of the group lose the shift, and each consumer's bias b becomes b + W d.
    Computed in float64, rounded once. Statistics of the consumers no longer hold and are dropped.

    Args:
        program: The program that the group was found in.
        group: One for which `why_not_shifted` is None.
        shift: d, by channel, [size].
        linears: All linears of the program, by name.
    """
    exact = shift.double()
    biases: dict[str, torch.Tensor] = {}
    for part in group.shifts:
        biases[part.parameter] = -_of_inputs(exact, part.channels)
    for consumer in group.consumers:
        linear = linears[consumer.linear]
        gain = linear.weight(program).double() @ _of_inputs(exact, consumer.channels)
        for name in _biases(program, linear):
            biases[name] = gain
    updates = {}
    for name, change in biases.items():
        bias = program.weights[name]
        updates[name] = (bias.double() + change).to(bias.dtype)
    shifted = program.with_weights(updates)
    known = program.facts.get(Statistics)
    if isinstance(known, Statistics):
        consumers = {consumer.linear for consumer in group.consumers}
        edges = {name: edge for name, edge in known.edges.items() if name not in consumers}
        shifted = shifted.with_fact(Statistics(edges))
    return shifted
