"""Random scales, folded into groups of channels to see whether a program feels them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch

from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup


def random_scales(group: ScaleGroup, seed: int, powers_of_two: bool = False) -> torch.Tensor:
    """Returns a scale between 1/e and e for each channel, of any sign where the group allows it.

    Powers of two do not round: what does not feel them gives the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(group.size, generator=generator, dtype=torch.float64) * 2 - 1
    scales = torch.exp2((3 * exponents).round()) if powers_of_two else torch.exp(exponents)
    if not group.positive:
        scales *= torch.randint(0, 2, (group.size,), generator=generator) * 2 - 1
    return scales


def leaving_out(group: ScaleGroup, each_matrix: bool = True) -> Iterator[tuple[str, ScaleGroup]]:
    """Yields the group without one part of one member, and whose: each must be missed.

    A part is what one member multiplies, or what it divides; of a stack, one matrix of it,
    or with `each_matrix=False` all of them.
    """
    for place, member in enumerate(group.members):
        stack = range(len(member.exponents)) if member.stacked and each_matrix else (...,)
        for index, sign in itertools.product(stack, (1, -1)):
            exponents = member.exponents.clone()
            part = exponents[index].sign() == sign
            if not bool(part.any()):
                continue
            exponents[index] = torch.where(part, 0, exponents[index])
            rest = dataclasses.replace(member, exponents=exponents)
            members = (*group.members[:place], rest, *group.members[place + 1 :])
            yield member.parameter, dataclasses.replace(group, members=members)


def fold(program: Program, groups: Iterable[ScaleGroup], *, powers_of_two: bool = False) -> Program:
    """Returns the program with random scales in all groups at once."""
    updates: dict[str, torch.Tensor] = {}
    for seed, group in enumerate(groups):
        scales = random_scales(group, seed, powers_of_two)
        for member in group.members:
            name = member.parameter
            tensor = updates.get(name, program.weights[name]).double()
            updates[name] = member.scaled(tensor, scales)
    rounded = {name: t.to(program.weights.source(name).dtype) for name, t in updates.items()}
    # Only what `run` reads; `with_weights` would copy the graph each time.
    return dataclasses.replace(program, weights=program.weights.replace(rounded))
