"""UpdatingPruner: what all passes share that prune and change the weights that stay."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from zeroskip.ir import process_group
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.program import Program
from zeroskip.ir.pruning_error import output_error
from zeroskip.ir.scaled_linear import stacked_weights
from zeroskip.ir.selection import select_linears
from zeroskip.ir.statistics import ScoreMultipliers, Statistics
from zeroskip.ir.weights import all_finite, pack_bits, zero_outside
from zeroskip.passes.pattern_pass import PatternPass, saw_too_little, warn_of_few_tokens


@dataclass(frozen=True)
class UpdatingPruner(PatternPass):
    """Chooses a mask for each linear and makes the kept weights take over from the pruned ones.

    The weights that come out are zero outside their masks: `ApplyMasks` is not needed, and does
    nothing after it. Statistics are dropped, as by `ApplyMasks`. A linear that the same pass pruned
    to the same pattern already is left as it is. An expert that few calibration tokens reached is
    pruned by magnitude, with a warning.
    """

    requires = (Statistics,)
    provides = (Masks, SparseWeights)
    invalidates = (Statistics, ScoreMultipliers)
    lossy = True

    @abstractmethod
    def prune(
        self, program: Program, linear: Linear, weight: torch.Tensor, pattern: SparsityPattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new weight, float32 [out, in], and what is kept of it, boolean [out, in].

        Args:
            program: Gives the facts: `program.fact(Statistics).gram_of(linear.name)`.
            linear: Which linear.
            weight: Its weight as float32 [out, in], finite; not to be written into.
            pattern: What to prune to.
        """

    def is_done(
        self, program: Program, linear: Linear, pattern: SparsityPattern, before: Mask
    ) -> bool:
        """Whether a linear that was pruned under a mask before is left as it is."""
        return (before.score, before.pattern) == (self.name, pattern)

    def keep_unseen(
        self, program: Program, linear: Linear, weight: torch.Tensor, pattern: SparsityPattern
    ) -> torch.Tensor:
        """Returns what is kept of a linear of which calibration says next to nothing."""
        return pattern.project(weight.abs())

    def run(self, program: Program) -> Program:
        """Prunes every selected linear."""
        statistics = program.fact(Statistics)
        known = program.facts.get(SparseWeights, SparseWeights())
        assert isinstance(known, SparseWeights)
        masks: dict[str, Mask] = {}
        work: list[tuple[Linear, SparsityPattern]] = []
        unseen: list[str] = []
        for linear in select_linears(program, self.include, self.exclude):
            pattern = self.pattern_of(program, linear)
            before = known.masks.get(linear.name)
            if before is not None and self.is_done(program, linear, pattern, before):
                masks[linear.name] = before
                continue
            work.append((linear, pattern))
            if saw_too_little(linear, statistics.of(linear.name)):
                unseen.append(linear.name)
        # Processes that share the compilation share the linears out, then tell each other.
        owners = process_group.share_out([math.prod(linear.shape) for linear, _ in work])
        found = [
            self._pruned(program, linear, pattern, linear.name in unseen)
            if owner == process_group.rank()
            else (torch.empty(linear.shape), torch.empty(linear.shape, dtype=torch.bool))
            for (linear, pattern), owner in zip(work, owners, strict=True)
        ]
        weights: list[tuple[Linear, torch.Tensor]] = []
        for (linear, pattern), owner, (pruned, keep) in zip(work, owners, found, strict=True):
            weight = process_group.from_owner(pruned, owner)
            weights.append((linear, weight))
            bits = pack_bits(process_group.from_owner(keep, owner))
            edge = statistics.of(linear.name)
            error = output_error(linear.weight(program), weight, edge) if edge.count else None
            masks[linear.name] = Mask(bits, linear.shape, pattern, self.name, error)
        warn_of_few_tokens(unseen, self.name)
        if weights:
            program = program.with_weights(stacked_weights(program, weights))
        chosen = program.facts.get(Masks, Masks())
        assert isinstance(chosen, Masks)
        return program.with_fact(chosen.merge(Masks(masks)), known.merge(SparseWeights(masks)))

    def _pruned(
        self, program: Program, linear: Linear, pattern: SparsityPattern, unseen: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prunes one linear: its new weight, and what is kept of it."""
        weight = self.finite_weight(program, linear)
        if unseen:
            pruned, keep = weight, self.keep_unseen(program, linear, weight, pattern)
        else:
            pruned, keep = self.prune(program, linear, weight, pattern)
        pruned = zero_outside(pruned, keep)
        self._check_finite(pruned, linear, program)
        return pruned, keep

    def _check_finite(self, weight: torch.Tensor, linear: Linear, program: Program) -> None:
        dtype = program.weights.source(linear.parameter).dtype
        if not all_finite(weight.to(dtype)):
            raise CompileError(
                f"the new weights are not finite in {dtype}",
                where=linear.name,
                pass_name=self.name,
                next_step="look for extreme weights or activations in this linear; "
                "more damping or more calibration data may help",
            )
