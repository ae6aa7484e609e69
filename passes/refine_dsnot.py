"""refine-dsnot: swap kept and pruned weights so that pruning moves the mean of each output less."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.biases import ShiftedBiases
from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import NM, Block
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.weight_swaps import Moments, best_counts, propose_swaps
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.pattern_pass import saw_too_little


@dataclass(frozen=True)
class RefineDSnoT(Pass):
    """Improves the masks of any pruner without training: Dynamic Sparse No Training.

    Each swap keeps a pruned weight that takes the mean error e_i = sum of W_ij E[x_j] over what row i
    prunes towards zero, and prunes a kept weight of little |W_ij| sqrt(E[x_j^2]) in its place. Each
    row keeps as many weights as before; with N:M a swap stays within its group. No weight changes.

    A smaller mean error may come with a larger error. With `guard`, which is ours, each row stops
    after the swap where E[(d_i x)^2], d_i what it prunes, is least, or makes none. That is exact
    after `Observe(gram=True)`, else it is taken as if channels were uncorrelated.

    Its place is between the pruner and `ApplyMasks`, before `ShiftToBias`, which takes up what is
    left of the mean error where there are biases. Masks that it refined already, and experts that few
    calibration tokens reached, are left as they are.

    Refuses masks that were applied, or made up for by a bias, already; block patterns, whose weights
    are not kept one by one; and a linear with a mask and without statistics.

    Args:
        cycles: At most so many swaps for a row.
        tolerance: A row ends when |e_i| is at most this share of what it would typically be if
            inputs had random signs, sqrt(sum of W_ij^2 E[x_j^2]); below the effect of one weight
            swaps only swing around zero. The public code compares a sum over tokens with 0.1, which
            depends on their number and on the model.
        power: Of the variance that divides the effect of a weight that may be grown.
        guard: Keep only swaps that lower the error.
        include: Shell-style patterns of linears. Empty: every one that has a mask.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    arXiv 2310.08915, section 3; `guard=False` is as published, on all linears.
    """

    cycles: int = 50
    tolerance: float = 0.03
    power: float = 1.0
    guard: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "refine-dsnot"
    requires = (Statistics, Masks)

    def __post_init__(self) -> None:
        problems = {
            "cycles": self.cycles >= 1,
            "tolerance": 0 <= self.tolerance < float("inf"),
            "power": 0 <= self.power < float("inf"),
        }
        self._refuse_unless(problems)

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)

    def targets(self, program: Program) -> frozenset[str] | None:
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return frozenset(n.name for n in self._chosen(program) if n.name in known.masks)

    def _chosen(self, program: Program) -> list[Linear]:
        return select_linears(program, self.include or ("*",), self.exclude)

    def run(self, program: Program) -> Program:
        known = program.fact(Masks)
        refined = {}
        for linear in self._chosen(program):
            mask = known.masks.get(linear.name)
            if mask is None or mask.score.endswith(f"+{self.name}"):
                continue
            self._check_fit(program, linear, mask)
            if saw_too_little(linear, program.fact(Statistics).of(linear.name)):
                continue
            keep = self._refine(program, linear, mask)
            score = f"{mask.score}+{self.name}"
            refined[linear.name] = Mask(pack_bits(keep), mask.shape, mask.pattern, score)
        return program.with_fact(known.merge(Masks(refined)))

    def _check_fit(self, program: Program, linear: Linear, mask: Mask) -> None:
        applied = program.facts.get(SparseWeights, SparseWeights())
        shifted = program.facts.get(ShiftedBiases, ShiftedBiases())
        assert isinstance(applied, SparseWeights)
        assert isinstance(shifted, ShiftedBiases)
        if isinstance(mask.pattern, Block):
            raise PatternError(
                f"the mask obeys {mask.pattern}, which keeps no weight on its own",
                where=linear.name,
                pass_name=self.name,
                next_step=f'leave it as it is with exclude=("{linear.name}",)',
            )
        if mask.same_as(applied.masks.get(linear.name)):
            raise CompileError(
                "its mask was applied already: what it took away is gone",
                where=linear.name,
                pass_name=self.name,
                next_step=f"put {self.name} between the pruner and apply-masks",
            )
        shift = shifted.shifts.get(linear.name)
        if shift is not None and mask.same_as(shift.mask):
            raise CompileError(
                "its bias makes up for the mask as it is",
                where=linear.name,
                pass_name=self.name,
                next_step=f"put shift-to-bias after {self.name}",
            )

    def _refine(self, program: Program, linear: Linear, mask: Mask) -> torch.Tensor:
        edge = program.fact(Statistics).of(linear.name)
        gram = edge.gram / edge.count if self.guard and edge.gram is not None else None
        moments = Moments(edge.mean(), edge.variance(), gram)
        weight, keep = linear.weight(program).float(), mask.keep()
        group = mask.pattern.m if isinstance(mask.pattern, NM) else None
        swaps = propose_swaps(weight, keep, moments, group, self.cycles, self.tolerance, self.power)
        return swaps.apply(keep, best_counts(swaps, weight, keep, moments) if self.guard else None)
