"""Blocks of channels that can change places, and everything that has to move when they do.

The hidden units of an MLP are a block: rows of what produces them, biases, and columns of what reads
them move together. So are the channels of one value head against the columns of the output
projection that read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.permutation_flow import PermutationFlow
from zeroskip.ir.program import Program
from zeroskip.ir.scale_equations import count_runs
from zeroskip.ir.scale_groups import input_axis
from zeroskip.ir.scale_products import MOST_GROWTH
from zeroskip.ir.scale_values import TooFewRows, VariableKey


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """An axis of a parameter along which a group's channels lie.

    Args:
        parameter: Fully qualified name.
        axis: The axis; None when the parameter is read element by element, as if it were flat.
        expert: Index into axis 0 of a stack of matrices, or None.
        places: Where each channel lies, int64 [occurrences, channels].
    """

    parameter: str
    axis: int | None
    expert: int | None
    places: torch.Tensor

    def index(self, order: torch.Tensor, size: int) -> torch.Tensor:
        """Returns which entry comes to each place of the axis when slot j gets channel order[j]."""
        index = torch.arange(size)
        index[self.places] = self.places[:, order]
        return index


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can change places.

    Args:
        name: The parameters at both ends.
        size: Number of channels, in the order of the columns of the first consumer.
        members: All that moves, consumers included.
        consumers: The linears whose inputs the channels are; `places` are columns.
        linears: All linears whose weights move.
    """

    name: str
    size: int
    members: tuple[ChannelAxis, ...]
    consumers: tuple[tuple[Linear, ChannelAxis], ...]
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGroups:
    """Every group of a program that is the input of a linear, and what was refused.

    Args:
        groups: In the order of the program.
        refusals: By linear, why (some of) its inputs cannot change places.
    """

    groups: tuple[ChannelGroup, ...]
    refusals: dict[str, str]


def find_channel_groups(program: Program) -> ChannelGroups:
    """Finds every block of channels whose permutation leaves what a program computes as it is.

    Args:
        program: At level `captured`. Its inputs and outputs keep their order.
    """
    flow = _flow(program)
    linears = find_linears(program)
    axes = {
        (key.parameter, key.axis, expert): row
        for key, labels in flow.variables.items()
        if not key.parameter.startswith("?")
        for expert, row in _rows(flow, key, labels)
    }
    block_of, count = _blocks(flow, list(axes.values()))
    inside: dict[int, list[tuple[str, int | None, int | None]]] = {}
    for place, row in axes.items():
        for block in torch.unique(block_of[row]).tolist():
            inside.setdefault(block, []).append(place)
    groups: list[ChannelGroup] = []
    done: set[int] = {count}
    for linear in linears:
        columns = axes.get((linear.parameter, input_axis(linear), linear.expert))
        if columns is None:
            continue
        for block in _in_order(block_of[columns]):
            if block not in done:
                done.add(block)
                labels = torch.unique(columns[block_of[columns] == block])
                groups.append(_group(block, labels, axes, inside[block], linears))
    return ChannelGroups(
        tuple(_named(groups)), dict(_refusals(flow, linears, axes, block_of, count))
    )


def _flow(program: Program) -> PermutationFlow:
    growth = 1
    while True:
        try:
            return PermutationFlow(program, growth)
        except TooFewRows as few:
            growth = min(growth * int(few.args[0]), MOST_GROWTH)


def _rows(
    flow: PermutationFlow, key: VariableKey, labels: torch.Tensor
) -> Iterator[tuple[int | None, torch.Tensor]]:
    """The labels along an axis, for each matrix of a stack."""
    known = flow.equations.canonical(labels)
    if not key.stacked:
        yield None, known
        return
    count = flow.program.weights.source(key.parameter).shape[0]
    yield from enumerate(known.view(count, -1))


def _blocks(flow: PermutationFlow, rows: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The block of each label, and the number of blocks, which stands for none.

    A label that stays, or whose signature no other has, is in none.
    """
    labels = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), *rows]))
    labels = labels[labels != 0]
    signatures, which = torch.unique(flow.signatures[labels], return_inverse=True)
    alone = torch.bincount(which, minlength=len(signatures)) < 2
    count = len(signatures)
    block_of = torch.full((len(flow.signatures),), count)
    block_of[labels] = torch.where(alone[which], count, which) if count else which
    return block_of, count


def _in_order(blocks: torch.Tensor) -> list[int]:
    return list(dict.fromkeys(blocks.tolist()))


def _group(
    block: int,
    labels: torch.Tensor,
    axes: dict[tuple[str, int | None, int | None], torch.Tensor],
    inside: list[tuple[str, int | None, int | None]],
    linears: list[Linear],
) -> ChannelGroup:
    by_place = {(n.parameter, input_axis(n), n.expert): n for n in linears}
    first = next(p for p in inside if p in by_place)
    # Slots are numbered by the first consumer's columns.
    found = axes[first]
    found = found[torch.isin(found, labels)]
    slots = torch.tensor(_in_order(found))
    members, consumers = [], []
    for place in inside:
        axis = ChannelAxis(*place, _places(axes[place], slots))
        members.append(axis)
        if place in by_place:
            consumers.append((by_place[place], axis))
    parameters = {(p, e) for p, _, e in inside}
    moved = [n.name for n in linears if (n.parameter, n.expert) in parameters]
    producer = next((m.parameter for m in members if (m.parameter, m.axis, m.expert) != first), "")
    name = f"{producer} -> {consumers[0][0].name}"
    return ChannelGroup(name, len(slots), tuple(members), tuple(consumers), tuple(moved))


def _places(row: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Where each slot's label occurs along an axis, [occurrences, slots]."""
    columns = torch.isin(row, slots).nonzero().flatten()
    ordered = columns[torch.argsort(row[columns], stable=True)]
    labels, first, total = count_runs(row[ordered])
    at = first[torch.searchsorted(labels, slots)]
    return ordered[at + torch.arange(int(total[0]))[:, None]]


def _named(groups: list[ChannelGroup]) -> Iterator[ChannelGroup]:
    """Numbers groups of one name, such as those of heads."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = number = seen.get(group.name, 0) + 1
        name = group.name if number == 1 else f"{group.name} ({number})"
        yield ChannelGroup(name, group.size, group.members, group.consumers, group.linears)


def _refusals(
    flow: PermutationFlow,
    linears: list[Linear],
    axes: dict[tuple[str, int | None, int | None], torch.Tensor],
    block_of: torch.Tensor,
    count: int,
) -> Iterator[tuple[str, str]]:
    for linear in linears:
        row = axes.get((linear.parameter, input_axis(linear), linear.expert))
        if row is None:
            yield linear.name, "its weight is not read as a matrix"
            continue
        left = block_of[row] == count
        if not bool(left.any()):
            continue
        part = "" if bool(left.all()) else f"{int(left.sum())} of {len(left)}: "
        yield linear.name, part + _why(flow, flow.variables, linear, row[left])


def _why(
    flow: PermutationFlow,
    variables: dict[VariableKey, torch.Tensor],
    linear: Linear,
    labels: torch.Tensor,
) -> str:
    """Why labels are in no block: they stay where they are, or nothing is like them."""
    if bool((labels == 0).any()):
        key = VariableKey(linear.parameter, input_axis(linear), linear.expert is not None)
        found = variables[key]
        if linear.expert is not None:
            size = len(found) // flow.program.weights.source(linear.parameter).shape[0]
            found = found[linear.expert * size : (linear.expert + 1) * size]
        pinned = found[flow.equations.canonical(found) == 0]
        reasons = flow.equations.why_pinned(pinned)
        return reasons[0] if reasons else "they stay where they are"
    reasons = [flow.parted[label] for label in labels.tolist() if label in flow.parted]
    return reasons[0] if reasons else "each of them is used in a way of its own"
