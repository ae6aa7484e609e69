"""Permuting a group's channels in the weights, in statistics and in scales; the fact of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeroskip.ir.channel_groups import ChannelAxis, ChannelGroup
from zeroskip.ir.facts import Fact
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers, Statistics
from zeroskip.ir.weights import InMemory, Source

# A group, and the channel that each slot gets, int64 [size].
Move = tuple[ChannelGroup, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Reordered:
    """A source with the entries along some of its axes in another order when it is loaded.

    A weight on disk stays there: the orders are all that is held.

    Args:
        source: The tensor before.
        parts: Axes, and the order that each is put in.
    """

    source: Source
    parts: tuple[tuple[ChannelAxis, torch.Tensor], ...]

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        tensor = self.source.load()
        for axis, order in self.parts:
            tensor = reordered(tensor, axis, order)
        return tensor


def reordered(tensor: torch.Tensor, axis: ChannelAxis, order: torch.Tensor) -> torch.Tensor:
    """Returns a parameter with the channels along one axis in another order."""
    if axis.axis is None:
        flat = tensor.reshape(-1)
        return flat[axis.index(order, len(flat))].view(tensor.shape)
    index = axis.index(order, tensor.shape[axis.axis])
    if axis.expert is None:
        return tensor.index_select(axis.axis, index)
    stack = tensor.clone()
    stack[axis.expert] = tensor[axis.expert].index_select(axis.axis - 1, index)
    return stack


@dataclass(frozen=True, eq=False)
class Permutation:
    """How the inputs of one linear were permuted.

    Args:
        order: Column j was column `order[j]` before any permutation, int64 [in].
        pattern: The pattern that it was chosen for.
        score: The pruner whose scores it was chosen by.
        before: What the pattern kept of the scores, as a share of their sum, in the order before.
        after: The same after.
    """

    order: torch.Tensor
    pattern: str
    score: str
    before: float
    after: float


@dataclass(frozen=True)
class PermutedChannels(Fact):
    """The linears whose inputs were permuted, and why others were not.

    Args:
        linears: By linear; also those whose order was found to be the best.
        refused: By linear, why its inputs, or some of them, were left as they were.
    """

    linears: Mapping[str, Permutation] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        widths = {linear.name: linear.in_features for linear in find_linears(program)}
        for name, each in self.linears.items():
            if name not in widths:
                return f"the inputs of {name} are said to be permuted, and it is not a linear"
            if not torch.equal(each.order.sort().values, torch.arange(widths[name])):
                return f"what the inputs of {name} were permuted by is no permutation of them"
        return None

    def restrict(self, linears: Iterable[str]) -> PermutedChannels:
        names = set(linears)
        return PermutedChannels(
            {n: p for n, p in self.linears.items() if n in names},
            {n: why for n, why in self.refused.items() if n in names},
        )

    def merge(self, other: PermutedChannels) -> PermutedChannels:
        return PermutedChannels(
            {**self.linears, **other.linears}, {**self.refused, **other.refused}
        )


def permute_channels(program: Program, moves: Sequence[Move]) -> Program:
    """Returns the program with the channels of some groups in another order.

    What is known of the inputs of linears, and what was folded into channels, is reordered along.

    Args:
        program: The program that the groups were found in.
        moves: Groups, and the channel that each slot gets.
    """
    parts: dict[str, list[tuple[ChannelAxis, torch.Tensor]]] = {}
    for group, order in moves:
        for member in group.members:
            parts.setdefault(member.parameter, []).append((member, order))
    updates = {name: _moved(program.weights.source(name), found) for name, found in parts.items()}
    moved = program.with_weights(updates)
    columns = columns_after(moves)
    facts: list[Fact] = []
    known = program.facts.get(Statistics)
    if isinstance(known, Statistics):
        facts.append(_reordered_statistics(known, columns))
    multipliers = program.facts.get(ScoreMultipliers)
    if isinstance(multipliers, ScoreMultipliers):
        facts.append(_reordered_multipliers(multipliers, columns))
    folded, groups = program.facts.get(FoldedScales), program.facts.get(ScaleGroups)
    if isinstance(folded, FoldedScales) and isinstance(groups, ScaleGroups):
        facts.append(_reordered_folds(folded, groups, parts))
    return moved.with_fact(*facts)


def columns_after(moves: Iterable[Move]) -> dict[str, torch.Tensor]:
    """Returns for each linear whose inputs move which column comes to each place, int64 [in]."""
    columns: dict[str, torch.Tensor] = {}
    for group, order in moves:
        for linear, axis in group.consumers:
            index = axis.index(order, linear.in_features)
            columns[linear.name] = columns.get(linear.name, torch.arange(len(index)))[index]
    return columns


def _moved(source: Source, parts: list[tuple[ChannelAxis, torch.Tensor]]) -> Source:
    moved = Reordered(source, tuple(parts))
    if isinstance(source, InMemory):
        return InMemory(moved.load())
    if isinstance(source, Reordered):
        return Reordered(source.source, (*source.parts, *parts))
    return moved


def _reordered_statistics(known: Statistics, columns: Mapping[str, torch.Tensor]) -> Statistics:
    edges = dict(known.edges)
    done: dict[tuple[int, bytes], EdgeStatistics] = {}  # linears that share an edge go on sharing
    for name, index in columns.items():
        edge = edges.get(name)
        if edge is None:
            continue
        key = (id(edge), index.numpy().tobytes())
        if key not in done:
            done[key] = dataclasses.replace(
                edge,
                total=edge.total[index],
                total_of_squares=edge.total_of_squares[index],
                abs_max=edge.abs_max[index],
                gram=None if edge.gram is None else edge.gram[index][:, index],
            )
        edges[name] = done[key]
    return Statistics(edges)


def _reordered_multipliers(
    known: ScoreMultipliers, columns: Mapping[str, torch.Tensor]
) -> ScoreMultipliers:
    linears = dict(known.linears)
    for name, index in columns.items():
        if name in linears:
            multipliers = linears[name].multipliers[index]
            linears[name] = dataclasses.replace(linears[name], multipliers=multipliers)
    return ScoreMultipliers(linears)


def _reordered_folds(
    known: FoldedScales,
    groups: ScaleGroups,
    parts: Mapping[str, list[tuple[ChannelAxis, torch.Tensor]]],
) -> FoldedScales:
    """Scales go with their channels; the places of a scale group stay, as the graph does."""
    folds = dict(known.folds)
    for name, fold in known.folds.items():
        scales = fold.scales.clone()
        for member in groups.groups[name].members if name in groups.groups else ():
            for axis, order in parts.get(member.parameter, ()):
                if axis.axis != member.axis or (axis.expert is None) == member.stacked:
                    continue
                row = member.channels if axis.expert is None else member.channels[axis.expert]
                row = row.reshape(-1)
                to, of = row[axis.places], row[axis.places[:, order]]
                inside = (to >= 0) & (of >= 0)
                scales[to[inside]] = fold.scales[of[inside]]
        folds[name] = dataclasses.replace(fold, scales=scales)
    return FoldedScales(folds, known.refused)
