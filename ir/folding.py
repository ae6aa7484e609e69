"""Folding scales into the members of a group, and what is then known of the inputs of linears."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Fact
from zeroskip.ir.formats import Rounded
from zeroskip.ir.program import Program
from zeroskip.ir.scale_equations import raised
from zeroskip.ir.scale_groups import Consumer, Member, ScaleGroup, ScaleGroups
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.weights import InMemory, Masked, Source

# A weight that a fold brings closer to the largest number of its type than this may overflow later.
HEADROOM = 0.5
# A scale this close to 1 is 1: what is left of s * (1 / s).
_ONE = 1e-12


@dataclass(frozen=True, eq=False)
class Scaled:
    """A source whose channels are multiplied by scales when it is loaded.

    A weight on disk stays there: the scales are all that is held.

    Args:
        source: The tensor before scaling.
        parts: Members of groups that the tensor has, and the scales of each group, float64.
    """

    source: Source
    parts: tuple[tuple[Member, torch.Tensor], ...]

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.exact().to(self.dtype)

    def exact(self) -> torch.Tensor:
        """Returns the tensor as float64, before it is rounded to its own type."""
        exact = self.source.load().double()
        for member, scales in self.parts:
            exact = member.scaled(exact, scales)
        return exact


@dataclass(frozen=True, eq=False)
class Fold:
    """What was folded into one group, all folds so far together.

    Args:
        scales: What the inputs of the group's consumers were divided by and their weights
            multiplied by, float64 [size].
        linears: The linears that the group has members in.
    """

    scales: torch.Tensor
    linears: tuple[str, ...]


@dataclass(frozen=True)
class FoldedScales(Fact):
    """The scales that were folded into each group, and which groups were left as they were.

    Args:
        folds: By group.
        refused: By group, why it was left alone.
    """

    folds: Mapping[str, Fold] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        known = program.facts.get(ScaleGroups)
        for name, fold in self.folds.items():
            if not bool(torch.isfinite(fold.scales).all()) or bool((fold.scales == 0).any()):
                return f"a scale folded into {name} is zero or not finite"
            if isinstance(known, ScaleGroups) and name in known.groups:
                size = known.groups[name].size
                if fold.scales.shape != (size,):
                    return f"{len(fold.scales)} scales were folded into {name}, which has {size}"
        return None

    def restrict(self, linears: Iterable[str]) -> FoldedScales:
        names = set(linears)
        folds = {n: f for n, f in self.folds.items() if names.issuperset(f.linears)}
        return FoldedScales(folds, self.refused)

    def merge(self, other: FoldedScales) -> FoldedScales:
        refused = {n: why for n, why in self.refused.items() if n not in other.folds}
        return FoldedScales({**self.folds, **other.folds}, {**refused, **other.refused})

    def total(self, group: ScaleGroup) -> torch.Tensor:
        """Returns what was folded into a group so far, float64 [size]; ones when nothing was."""
        fold = self.folds.get(group.name)
        return torch.ones(group.size, dtype=torch.float64) if fold is None else fold.scales

    def after(self, group: ScaleGroup, scales: torch.Tensor) -> FoldedScales:
        """Returns the fact after one more fold into a group; one that is undone is forgotten."""
        total = _snapped(self.total(group) * scales.double())
        folds = {name: fold for name, fold in self.folds.items() if name != group.name}
        if bool((total != 1).any()):
            folds[group.name] = Fold(total, group.linears)
        refused = {name: why for name, why in self.refused.items() if name != group.name}
        return FoldedScales(folds, refused)


def find_group(groups: Mapping[str, ScaleGroup], name: str) -> ScaleGroup:
    """Returns the group of a name.

    Raises:
        CompileError: There is none.
    """
    if name not in groups:
        nearest = difflib.get_close_matches(name, groups, n=1) or [*groups][:1]
        raise CompileError(
            f"there is no group of scales {name!r}",
            next_step=f"there is {nearest[0]!r}; `zeroskip inspect --scales` lists all"
            if nearest
            else "this program has none",
        )
    return groups[name]


def check_scales(group: ScaleGroup, scales: torch.Tensor) -> None:
    """Checks that scales can be folded into a group.

    Raises:
        CompileError: Their number is not the group's, or one is not finite, zero, or less than zero
            where the group demands it; names the group.
    """
    if scales.shape != (group.size,):
        raise CompileError(
            f"scales of shape {tuple(scales.shape)} for a group of {group.size} channels",
            where=group.name,
        )
    wrong = ~torch.isfinite(scales) | ((scales <= 0) if group.positive else (scales == 0))
    if bool(wrong.any()):
        channel = int(wrong.nonzero()[0])
        raise CompileError(
            f"the scale of channel {channel} is {float(scales[channel]):g}",
            where=group.name,
            next_step="scales must be finite and not zero"
            + (
                ", here greater than zero: a ReLU or the like lies between"
                if group.positive
                else ""
            ),
        )


def fold_scales(program: Program, group: ScaleGroup, scales: torch.Tensor) -> Program:
    """Returns the program with scales folded into every member of a group; see `fold_groups`."""
    return fold_groups(program, [(group, scales)])


def fold_groups(program: Program, folds: Sequence[tuple[ScaleGroup, torch.Tensor]]) -> Program:
    """Returns the program with scales folded into every member of some groups.

    Weights are computed in float64 and rounded once, whatever number of groups they are members of.
    One on disk stays there and is scaled whenever it is loaded; one in memory is replaced.
    Statistics of the linears whose inputs shrink are divided likewise, which is exact.

    Args:
        program: The program that the groups were found in.
        folds: Groups, and what the input weights of their consumers are multiplied by, [size]; not
            zero, and greater than zero where the group demands it.

    Raises:
        CompileError: See `check_scales`; or a weight would come close to the largest number of its
            type; or its values are already rounded for storage. Names the groups.
    """
    parts: dict[str, list[tuple[Member, torch.Tensor]]] = {}
    names: dict[str, list[str]] = {}
    for group, scales in folds:
        check_scales(group, scales)
        for member in group.members:
            parts.setdefault(member.parameter, []).append((member, scales.double()))
            names.setdefault(member.parameter, []).append(group.name)
    updates = {
        name: _folded(program.weights.source(name), found, f"{name} of {', '.join(names[name])}")
        for name, found in parts.items()
    }
    folded = program.with_weights(updates)
    known = program.facts.get(Statistics)
    if isinstance(known, Statistics):
        for group, scales in folds:
            known = divide_statistics(known, group.consumers, scales.double())
        folded = folded.with_fact(known)
    return folded


def unfolded(program: Program) -> Program:
    """Returns the program as it was before any fold, statistics included, up to one rounding."""
    known, groups = program.facts.get(FoldedScales), program.facts.get(ScaleGroups)
    if not isinstance(known, FoldedScales) or not isinstance(groups, ScaleGroups):
        return program
    folds = [
        (groups.groups[name], 1 / fold.scales)
        for name, fold in known.folds.items()
        if name in groups.groups
    ]
    return fold_groups(program, folds) if folds else program


def _folded(source: Source, parts: list[tuple[Member, torch.Tensor]], where: str) -> Source:
    """A source with scales folded in; a mask stays outermost, where `SparseWeights` looks for it."""
    if isinstance(source, Rounded):
        raise CompileError(
            f"its values are already rounded to {source.format.dtype}",
            where=where,
            next_step="fold before quantize-values",
        )
    if isinstance(source, Masked):
        return Masked(_folded(source.source, parts, where), source.bits)
    before = source.parts if isinstance(source, Scaled) else ()
    inner = source.source if isinstance(source, Scaled) else source
    scaled = Scaled(inner, _merged(before, parts))
    rounded = _rounded(scaled.exact(), inner.dtype, where)
    if isinstance(inner, InMemory):
        return InMemory(rounded)
    return scaled if scaled.parts else inner


def _merged(
    before: Iterable[tuple[Member, torch.Tensor]], parts: Iterable[tuple[Member, torch.Tensor]]
) -> tuple[tuple[Member, torch.Tensor], ...]:
    """All parts, scales of one member multiplied; what then is 1 is left out."""
    found = {id(member): (member, scales) for member, scales in before}
    for member, scales in parts:
        if id(member) in found:
            scales = _snapped(found[id(member)][1] * scales)
        found[id(member)] = (member, scales)
    return tuple((m, scales) for m, scales in found.values() if bool((scales != 1).any()))


def _snapped(scales: torch.Tensor) -> torch.Tensor:
    return torch.where((scales - 1).abs() < _ONE, torch.ones_like(scales), scales)


def _rounded(exact: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    limit = HEADROOM * torch.finfo(dtype).max
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if not largest < limit:
        raise CompileError(
            f"it would reach {largest:.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}",
            where=where,
            next_step="fold smaller scales, or fold in float32",
        )
    return exact.to(dtype)


def divide_statistics(
    statistics: Statistics, consumers: Iterable[Consumer], scales: torch.Tensor
) -> Statistics:
    """Returns the statistics after the inputs of some linears were divided by scales.

    Args:
        statistics: Of the inputs as they were.
        consumers: The linears, and the scale of each of their inputs.
        scales: By channel, float64.
    """
    edges = dict(statistics.edges)
    done: dict[
        tuple[int, bytes, bytes], EdgeStatistics
    ] = {}  # linears that share an edge go on sharing
    for consumer in consumers:
        edge = edges.get(consumer.linear)
        if edge is None:
            continue
        key = (id(edge), consumer.channels.numpy().tobytes(), consumer.exponents.numpy().tobytes())
        if key not in done:
            done[key] = _divided(edge, spread(scales, consumer))
        edges[consumer.linear] = done[key]
    return Statistics(edges)


def _divided(edge: EdgeStatistics, factor: torch.Tensor) -> EdgeStatistics:
    gram = edge.gram
    if gram is not None:
        # One axis after the other: a float64 copy of a wide one is gigabytes.
        single = factor.to(gram.dtype)
        gram = (gram / single[:, None]).div_(single)
    return dataclasses.replace(
        edge,
        total=edge.total / factor,
        total_of_squares=edge.total_of_squares / factor.square(),
        abs_max=(edge.abs_max.double() / factor.abs()).to(edge.abs_max.dtype),
        gram=gram,
    )


def spread(scales: torch.Tensor, consumer: Consumer) -> torch.Tensor:
    """Returns what divides each input of a consumer; 1 where the group has no part in it."""
    return raised(scales[consumer.channels.clamp(min=0)], consumer.exponents)
