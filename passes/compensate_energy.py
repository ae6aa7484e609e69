"""compensate-energy: give pruned rows and columns the energy back that the mask took."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from zeroskip.ir.distillation import OutputDivergence
from zeroskip.ir.errors import CalibrationError, CompileError
from zeroskip.ir.facts import Mask, Masks, QuantizedValues, SparseWeights
from zeroskip.ir.linears import Linear, find_linears, masked_sources
from zeroskip.ir.program import Program
from zeroskip.ir.scaled_linear import stacked_weights
from zeroskip.ir.statistics import ScoreMultipliers, Statistics
from zeroskip.ir.weight_energy import Compensated, Compensation, Correction, restore_energy
from zeroskip.ir.weights import all_finite
from zeroskip.passes.base import Pass, Scope, bare

Mode = Literal["column", "row", "both"]


@dataclass(frozen=True)
class CompensateEnergy(Pass):
    """Applies the masks, and scales what is left so that columns and rows have their energy again.

    For each column, then each row, with its mean m over the weights before pruning:

    s = sqrt(sum (W - m)^2 / sum (W * M - m)^2), clamped;    W' = ((W * M - m) s + m) * M

    It needs W with and without the mask: its place is between the pruner and `ApplyMasks`, which has
    nothing left to do. Rows and columns that keep nothing are left out. The arithmetic is float32 at
    least. A linear that was compensated under the same mask is left as it is. A shift that
    `ShiftToBias` found before stays that of the mask alone.

    More energy is no smaller error: that of a single layer nearly always rises, and there are models
    that it ruins. So with `guard` the whole program is run, as it would be with nothing but the masks
    and with each correction that `mode` allows, and the least divergence from the dense program's
    outputs wins: KL(dense || pruned) for logits, the relative squared error of each token for other
    outputs, without padding. What each one costs is in the fact `Compensated`. The batches that judge
    may be those that the masks were chosen on; nothing is fitted to them here.

    The guard sees the whole program, and then the pass runs once, after the pruner has gone through
    all layers: each layer is pruned for the inputs that unpruned layers before it give. Without it
    the pass runs layer by layer, right behind the pruner, and what it makes of one layer is what the
    next one is pruned for.

    Refuses masks that were applied already, weights that are not finite in the type that they are
    stored in, and, with `guard`, a program without calibration data.

    Args:
        mode: `column`, `row`, or `both`, columns first.
        clamp: Least and largest scale.
        guard: Judge on the outputs, and choose among nothing and what `mode` allows.
        held_out: How many calibration batches judge, the last ones; all, if there are fewer.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Compensated
        fact Masks
        fact SparseWeights

    Source: Yu et al., Statistical Correction, arXiv 2602.07375, energy compensation; its paper gives
    no range for the clamp, and has no guard.
    """

    mode: Mode = "both"
    clamp: tuple[float, float] = (0.5, 2.0)
    guard: bool = True
    held_out: int = 8

    name = "compensate-energy"
    requires = (Masks,)
    provides = (SparseWeights, Compensated)
    invalidates = (Statistics, ScoreMultipliers, QuantizedValues)
    lossy = True

    def __post_init__(self) -> None:
        problems = {
            "mode": self.mode in get_args(Mode),
            "clamp": len(self.clamp) == 2 and 0 < self.clamp[0] <= 1 <= self.clamp[1] < math.inf,
            "held_out": self.held_out >= 1,
        }
        self._refuse_unless(problems)

    @property
    def scope(self) -> Scope:
        return "program" if self.guard else "block"

    def check(self, program: Program) -> None:
        if self.guard and not program.calibration:
            raise CalibrationError(
                "there is no calibration data to judge on",
                pass_name=self.name,
                next_step="pass calibration=[...], or guard=False to compensate in any case",
            )

    def targets(self, program: Program) -> frozenset[str] | None:
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return frozenset(known.masks)

    def run(self, program: Program) -> Program:
        masks = program.fact(Masks).masks
        done = program.facts.get(Compensated, Compensated())
        sparse = program.facts.get(SparseWeights, SparseWeights())
        assert isinstance(done, Compensated)
        assert isinstance(sparse, SparseWeights)
        linears = [n for n in find_linears(program) if n.name in masks]
        linears = [n for n in linears if not _is_done(n, masks[n.name], done)]
        for linear in linears:
            if masks[linear.name].same_as(sparse.masks.get(linear.name)):
                raise CompileError(
                    "its mask was applied already: the energy that it took is not known any more",
                    where=linear.name,
                    pass_name=self.name,
                    next_step="put compensate-energy between the pruner and apply-masks",
                )
        mode: Correction = self.mode
        losses: dict[Correction, float] = {}
        batches = 0
        if self.guard and linears:
            judges = range(len(program.calibration))[-self.held_out :]
            losses, batches = self._losses(program, linears, judges), len(judges)
            mode = min(losses, key=losses.__getitem__)  # The first of equals, and none is first.
        program, found = self._compensated(program, linears, mode)
        made = Compensated(found, {str(name): loss for name, loss in losses.items()}, batches)
        return program.with_fact(sparse.merge(SparseWeights(masks)), done.merge(made))

    def _losses(
        self, program: Program, linears: Sequence[Linear], judges: Sequence[int]
    ) -> dict[Correction, float]:
        """The mean divergence of each candidate; infinite when it is not a number."""
        candidates: list[Correction] = ["none", "column", "row", "both"]
        if self.mode != "both":
            candidates = ["none", self.mode]
        running = program.loaded()
        running = dataclasses.replace(running, dense=program.dense or bare(running))
        divergence = OutputDivergence(running)
        losses = {}
        for mode in candidates:
            candidate, _ = self._compensated(program, linears, mode)
            names = candidate.weights.changed_since(program.weights)
            parameters = {name: candidate.weights[name] for name in names}
            with torch.no_grad():
                total = sum(float(divergence(index, parameters)) for index in judges)
            losses[mode] = total / len(judges) if math.isfinite(total) else math.inf
        return losses

    def _compensated(
        self, program: Program, linears: Sequence[Linear], mode: Correction
    ) -> tuple[Program, dict[str, Compensation]]:
        """Applies the masks and a correction; without one, the kept weights stay bit for bit."""
        masks = program.fact(Masks).masks
        if mode == "none":
            keeps = {linear.name: masks[linear.name].keep() for linear in linears}
            found = {n: Compensation(masks[n], mode, 1.0, 1.0) for n in keeps}
            return program.with_weights(masked_sources(program, keeps)), found
        found = {}
        weights = []
        for linear in linears:
            stored = linear.weight(program)
            mask = masks[linear.name]
            exact = stored.to(torch.promote_types(stored.dtype, torch.float32))
            restored, least, most = restore_energy(exact, mask.keep(), mode, self.clamp)
            rounded = restored.to(stored.dtype)
            if not all_finite(rounded):
                raise CompileError(
                    f"the new weights are not finite in {stored.dtype}",
                    where=linear.name,
                    pass_name=self.name,
                    next_step="look for NaN or extreme weights in this linear, or narrow `clamp`",
                )
            weights.append((linear, rounded))
            found[linear.name] = Compensation(mask, mode, least, most)
        return program.with_weights(stacked_weights(program, weights)), found


def _is_done(linear: Linear, mask: Mask, known: Compensated) -> bool:
    before = known.linears.get(linear.name)
    return before is not None and mask.same_as(before.mask)
