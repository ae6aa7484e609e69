"""permute-channels: put input channels in the order in which N:M keeps most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.channel_groups import ChannelGroup, find_channel_groups
from zeroskip.ir.channel_order import best_order
from zeroskip.ir.channel_permutation import (
    Move,
    Permutation,
    PermutedChannels,
    columns_after,
)
from zeroskip.ir.errors import PatternError, RecipeError
from zeroskip.ir.facts import Lowered, Masks, QuantizedValues, Roles, SparseWeights
from zeroskip.ir.formats import Rounded
from zeroskip.ir.patterns import NM, SparsityPattern, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.weights import Masked
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.exact_permutation import permute_exactly
from zeroskip.passes.pattern_pass import PatternPass
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Permutes the input channels of linears so that N:M keeps more of the scores; exact.

    N:M keeps n of every m neighbours, so it matters which channels are neighbours. Where channels
    can change places, they are dealt out to groups by their summed scores, then one of every group
    at a time is assigned where it adds most. Rows, biases and columns are permuted in the weights;
    nothing is left to compute at run time. No order is taken that keeps less than the one there is.

    Which channels can change places is found in the graph (`zeroskip.ir.permutation_flow`): hidden
    units of an MLP or an expert, whatever its activation, and channels within a value head. Each
    permutation is tried on inputs drawn at random; a group that moves the outputs is left as it
    was. The fact `PermutedChannels` says what was permuted, and why the other inputs were not.

    Refuses patterns that are not N:M. Leaves alone the channels of the residual stream, queries and
    keys, groups of N:M that hold channels of several blocks, and weights that are already pruned,
    rounded or shared with something else.

    Args:
        pattern: `2:4`, `4:8`, `2:4 pad`.
        pruner: The pass whose scores are to be kept, by name, with its options at their defaults.
        sweeps: How often each channel is assigned anew, at most; the paper does it once.
        include: Patterns of linears, as for the pruner.
        exclude: Patterns of linears whose inputs stay as they are.

    Before::

        %2 = gelu(%1) : f32[s0, 16]
        %3 = linear(%2, @down.weight, @down.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = gelu(%1) : f32[s0, 16]
        %3 = linear(%2, @down.weight, @down.bias) : f32[s0, 8]
        fact PermutedChannels
        fact Statistics

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024 (https://openreview.net/forum?id=Tr0lPx9woF, on no arXiv), channel
    permutation. Theirs permutes the inputs of every linear and gathers activations at run time.
    """

    pattern: str | SparsityPattern = "2:4"
    pruner: str = "prune-ria"
    sweeps: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "permute-channels"
    requires = (Statistics,)
    provides = (PermutedChannels,)

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        object.__setattr__(self, "pattern", str(pattern))
        if not isinstance(pattern, NM):
            raise PatternError(
                f"under {pattern} it makes no difference which channels are neighbours",
                pass_name=self.name,
                next_step='use an N:M pattern such as "2:4", or leave the pass out',
            )
        if self.sweeps < 0:
            raise RecipeError(
                f"sweeps={self.sweeps} is out of range",
                pass_name=self.name,
                next_step="0 deals the channels out only, 1 is the paper's",
            )

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._scorer().check(program)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def warning(self, later: Sequence[Pass]) -> str | None:
        pruner = next((step for step in later if isinstance(step, PatternPass)), None)
        if pruner is None:
            return f"{self.name} is of no use: nothing is pruned after it"
        if str(pruner.pattern) == str(self.pattern):
            return None
        return f"{self.name} permutes for {self.pattern}, and {pruner.name} prunes {pruner.pattern}"

    def run(self, program: Program) -> Program:
        known = program.facts.get(PermutedChannels, PermutedChannels())
        assert isinstance(known, PermutedChannels)
        wanted = {n.name: n for n in select_linears(program, self.include, self.exclude)}
        found = find_channel_groups(program)
        refused = {name: why for name, why in found.refusals.items() if name in wanted}
        scores: dict[str, torch.Tensor] = {}
        moves: list[Move] = []
        seen: set[str] = set()
        for group in found.groups:
            names = [linear.name for linear, _ in group.consumers if linear.name in wanted]
            if not names or all(self._is_done(known, name) for name in names):
                continue
            reason = self._refusal(program, group)
            bins = None if reason else _bins(group, names, self._pattern.m)
            if bins is None:
                reason = reason or f"its groups of {self._pattern.m} hold channels of other blocks"
                refused |= dict.fromkeys(names, reason)
                continue
            for name in names:
                if name not in scores:
                    scores[name] = self._scorer().finite_scores(program, wanted[name])
            order = best_order(_stacked(group, scores), bins, self._pattern.n, self.sweeps)
            seen.update(names)
            if bool((order != torch.arange(group.size)).any()):
                moves.append((group, order))
        permuted, done, failed = permute_exactly(program, moves)
        for group, _ in moves:
            if group.name in failed:
                consumers = [linear.name for linear, _ in group.consumers]
                refused |= dict.fromkeys(consumers, failed[group.name])
        fact = PermutedChannels(self._permutations(known, scores, seen, done), refused)
        return permuted.with_fact(known.merge(fact))

    @property
    def _pattern(self) -> NM:
        pattern = parse_pattern(self.pattern)
        assert isinstance(pattern, NM)
        return pattern

    def _scorer(self) -> Pruner:
        from zeroskip.passes import PASSES

        kind = PASSES.get(self.pruner)
        if kind is None or not issubclass(kind, Pruner):
            pruners = [name for name, cls in PASSES.items() if issubclass(cls, Pruner)]
            raise RecipeError(
                f"{self.pruner!r} is not a pruner",
                pass_name=self.name,
                next_step=f"one of {', '.join(pruners)}",
            )
        return kind(self.pattern, self.include, self.exclude)

    def _is_done(self, known: PermutedChannels, name: str) -> bool:
        before = known.linears.get(name)
        return before is not None and (before.pattern, before.score) == (
            str(self.pattern),
            self.pruner,
        )

    def _refusal(self, program: Program, group: ChannelGroup) -> str | None:
        """Why a group is left alone that could be permuted."""
        barred = {linear.name for linear in select_linears(program, self.exclude)}
        for linear, _ in group.consumers:
            if self.exclude and linear.name in barred:
                return f"its channels are those of {linear.name} too, which is excluded"
        roles, touched = program.fact(Roles), _touched(program)
        for name in group.linears:
            if name in roles.shared | roles.heads:
                return f"the weight of {name} is, or may be, read by something else too"
            if name in touched:
                return f"{name} is already pruned, rounded or lowered: permute before"
        for member in group.members:
            if isinstance(program.weights.source(member.parameter), Masked | Rounded):
                return f"{member.parameter} is already pruned or rounded: permute before"
        return None

    def _permutations(
        self,
        known: PermutedChannels,
        scores: Mapping[str, torch.Tensor],
        seen: set[str],
        done: Sequence[Move],
    ) -> dict[str, Permutation]:
        """What became of each linear whose inputs were looked at, or moved along."""
        columns = columns_after(done)
        found = {}
        for name in [*seen, *(name for name in columns if name not in seen)]:
            if name not in scores:
                continue  # It was not asked for, and moved along with others.
            width = scores[name].shape[1]
            index = columns.get(name, torch.arange(width))
            earlier = known.linears.get(name)
            found[name] = Permutation(
                order=index if earlier is None else earlier.order[index],
                pattern=str(self.pattern),
                score=self.pruner,
                before=_share(scores[name], self._pattern),
                after=_share(scores[name][:, index], self._pattern),
            )
        return found


def _touched(program: Program) -> set[str]:
    """The linears whose places mean something to what was decided about them."""
    touched: set[str] = set()
    for fact in program.facts.values():
        if isinstance(fact, Masks | SparseWeights):
            touched.update(fact.masks)
        elif isinstance(fact, QuantizedValues):
            touched.update(fact.formats)
        elif isinstance(fact, Lowered):
            touched.update(fact.operators)
    return touched


def _bins(group: ChannelGroup, names: Sequence[str], m: int) -> list[torch.Tensor] | None:
    """The slots of each group of N:M; None where one holds other channels, too, for some consumer."""
    keys, widths = [], []
    for linear, axis in group.consumers:
        if linear.name in names:
            places = torch.div(axis.places, m, rounding_mode="floor")
            keys.append(places)
            widths.append((linear.in_features - places * m).clamp(max=m))
    key, width = torch.cat(keys), torch.cat(widths)
    bins, which = torch.unique(key, dim=1, return_inverse=True)
    slots = [(which == number).nonzero().flatten() for number in range(bins.shape[1])]
    if any(bool((width[:, inside] != len(inside)).any()) for inside in slots):
        return None
    return slots


def _stacked(group: ChannelGroup, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scores of every column that a channel has, below one another: [rows, channels]."""
    return torch.cat(
        [
            scores[linear.name][:, places]
            for linear, axis in group.consumers
            if linear.name in scores
            for places in axis.places
        ]
    )


def _share(scores: torch.Tensor, pattern: NM) -> float:
    """How much of the scores a pattern keeps, as a share of their sum."""
    total = float(scores.sum(dtype=torch.float64))
    kept = scores.masked_fill(~pattern.project(scores), 0).sum(dtype=torch.float64)
    return float(kept) / total if total else 0.0
