"""fold-scales: rewrite weights by channel scales that cancel.

A group of scales s multiplies the columns of its consumers and divides what produces their inputs:
y = W x = (W S) (S^-1 x). Both are folded into the weights, so nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.folding import FoldedScales, check_scales, find_group, unfolded
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.exact_folding import fold_exactly
from zeroskip.passes.pattern_pass import next_unmoved_by_scales
from zeroskip.passes.scale_methods import (
    activation_scales,
    equalizing_scales,
    normalized,
    seen_consumers,
    smoothquant_scales,
)

METHODS = ("activation", "smoothquant", "equalize", "unfold")


@dataclass(frozen=True)
class FoldScales(Pass):
    """Folds channel scales into the weights of each group; the program computes what it did.

    Every fold is tried on inputs drawn at random. A group whose outputs move is left as it was, and
    the fact `FoldedScales` says why; the others are folded.

    Scales are those that a group has in the end: a second fold replaces the first, and the same
    one twice is one.

    A pruner that scores |W| * |x|, compared within rows or N:M groups, chooses the same weights
    whatever is folded (Wanda); a fold changes what magnitude, RIA and the like choose.

    Args:
        method: How scales are chosen, for the inputs x of the consumers and their weights W.
            `activation`: sqrt(E[x^2]), so that magnitude scores become Wanda's.
            `smoothquant`: max|x|^alpha / max|W|^(1 - alpha) (Xiao et al., arXiv 2211.10438, eq. 4).
            `equalize`: sqrt(range of the producer / range of the consumers) (Nagel et al., arXiv
            1906.04721, eq. 11).
            `unfold`: 1, which takes all earlier folds back.
        scales: Scales by group instead, [size] each; `method` is then ignored. Of any sign but
            where a ReLU demands greater than zero. No recipe can hold them.
        alpha: For `smoothquant`.
        limit: What a method chooses is normalised to a geometric mean of 1 and kept in
            [1 / limit, limit].
        power_of_two: Round what a method chooses to powers of two: folds are then exact to the bit,
            but for gains that are read as 1 + w, and for float16.
        include: Patterns of linears; a group is folded if one of them is its consumer. Empty: all
            but output heads, expert routers and weights that something else reads too.
        exclude: Patterns of linears; a group with one of them among its consumers is left alone.

    Before::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact ScaleGroups

    After::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact FoldedScales
        fact ScaleGroups
    """

    method: str = "activation"
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    alpha: float = 0.5
    limit: float = 64.0
    power_of_two: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "fold-scales"
    requires = (ScaleGroups,)
    provides = (FoldedScales,)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CompileError(
                f"there is no method {self.method!r}",
                pass_name=self.name,
                next_step=f"one of {', '.join(METHODS)}",
            )
        if not 0 <= self.alpha <= 1 or not self.limit >= 1:
            raise CompileError(
                f"alpha {self.alpha} or limit {self.limit} is out of range",
                pass_name=self.name,
                next_step="alpha lies between 0 and 1, limit is at least 1",
            )

    @property
    def scope(self) -> Scope:
        """What is given by group, or taken back, may lie in several stages."""
        return "program" if self.scales or self.method == "unfold" else "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def warning(self, later: Sequence[Pass]) -> str | None:
        pruner = next_unmoved_by_scales(later)
        if pruner is None:
            return None
        if self.method == "unfold" and not self.scales:
            return None
        return (
            f"{self.name} changes nothing that {pruner.name} decides: its scores "
            "are compared where a scale cancels out of them"
        )

    def run(self, program: Program) -> Program:
        known = program.facts.get(FoldedScales, FoldedScales())
        assert isinstance(known, FoldedScales)
        given = bool(self.scales) or self.method == "unfold"
        # Methods look at what was there before any fold, so that none depends on another.
        original = program if given else unfolded(program)
        linears = {linear.name: linear for linear in find_linears(program)}
        changes: dict[str, torch.Tensor] = {}
        for group in self._groups(program):
            wanted = self._wanted(original, group, linears)
            if wanted is None:
                continue
            change = wanted / known.total(group)
            if not given and group.name in known.folds:
                # A method that is asked again differs by what was rounded.
                lost = (change - 1).abs() <= _rounding(program, group)
                change = torch.where(lost, 1.0, change)
            if bool((change != 1).any()):
                changes[group.name] = change
        return fold_exactly(program, changes)

    def _groups(self, program: Program) -> list[ScaleGroup]:
        """The groups to fold."""
        groups = program.fact(ScaleGroups).groups
        if self.scales:
            return [find_group(groups, name) for name in self.scales]
        from_data = self.method in ("activation", "smoothquant")
        if from_data and Statistics not in program.facts:
            raise RequirementError(
                f"the method {self.method!r} needs Statistics",
                pass_name=self.name,
                next_step="put observe before it",
            )
        everything = self.method == "unfold" and not self.include
        wanted = {linear.name for linear in select_linears(program, self.include, self.exclude)}
        barred = {linear.name for linear in select_linears(program, self.exclude)}
        chosen = []
        for group in groups.values():
            names = _readers(group)
            if self.exclude and not names.isdisjoint(barred):
                continue
            # A group without linears, such as two gains, is chosen where nothing is asked for.
            if everything or not names.isdisjoint(wanted) or not (names or self.include):
                chosen.append(group)
        return chosen

    def _wanted(
        self, program: Program, group: ScaleGroup, linears: Mapping[str, Linear]
    ) -> torch.Tensor | None:
        """What is to be folded into a group in all, float64 [size]; None where nothing is."""
        if self.scales:
            wanted = self.scales[group.name].double()
            check_scales(group, wanted)
            return wanted
        if self.method == "unfold":
            return torch.ones(group.size, dtype=torch.float64)
        if self.method == "activation":
            found = activation_scales(group, seen_consumers(program, group))
        elif self.method == "smoothquant":
            seen = seen_consumers(program, group)
            found = smoothquant_scales(program, group, seen, linears, self.alpha)
        else:
            found = equalizing_scales(program, group)
        if found is None:
            return None
        return normalized(found, self.limit, self.power_of_two)


def _readers(group: ScaleGroup) -> set[str]:
    """The linears that a group is chosen by: its consumers, or, without any, all of its linears."""
    return {consumer.linear for consumer in group.consumers} or set(group.linears)


def _rounding(program: Program, group: ScaleGroup) -> float:
    """How far a scale may lie from 1 and still be lost in the group's parameters."""
    dtypes = {program.weights.source(name).dtype for name in group.parameters}
    return 2 * max(torch.finfo(dtype).eps for dtype in dtypes)
