"""prune-magnitude: keep the largest weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.facts import Mask, Masks
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import Unstructured, parse_pattern, pruned_count
from zeroskip.ir.program import Program
from zeroskip.ir.selection import select_linears
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Scope
from zeroskip.passes.pruner import Pruner


@dataclass(frozen=True)
class PruneMagnitude(Pruner):
    """Scores a weight by its magnitude, |W_ij|; needs no calibration.

    `50%` compares within each row, `50% matrix` within each linear, `50% global` across all of
    them; N:M and blocks as they are. No weight changes: the masks are put into the facts.

    Refuses a weight that holds NaN or inf.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks

    Source: Han et al., "Learning both Weights and Connections", arXiv 1506.02626.
    """

    name = "prune-magnitude"
    compares_globally = True

    @property
    def scope(self) -> Scope:
        return "program" if self._is_global() else "block"

    def _is_global(self) -> bool:
        pattern = parse_pattern(self.pattern)
        return isinstance(pattern, Unstructured) and pattern.comparison == "global"

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()

    def run(self, program: Program) -> Program:
        return self._run_global(program) if self._is_global() else super().run(program)

    def _run_global(self, program: Program) -> Program:
        """Finds one threshold for all linears without holding more than one of them.

        The bits of a non-negative float32 order like the number. A histogram of the upper 16 bits
        finds the bucket of the threshold; only that bucket is gathered and selected from. Ties go
        by position, in the order of the linears.
        """
        pattern = parse_pattern(self.pattern)
        assert isinstance(pattern, Unstructured)
        linears = select_linears(program, self.include, self.exclude)
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for linear in linears:
            histogram += torch.bincount(self._upper(program, linear), minlength=1 << 16)
        total = int(histogram.sum())
        count = pruned_count(pattern.sparsity, total)
        bucket = int(torch.searchsorted(histogram.cumsum(0), count)) if count else 0
        below = int(histogram[:bucket].sum())
        candidates = torch.cat(
            [
                self.finite_scores(program, linear).flatten()[
                    self._upper(program, linear) == bucket
                ]
                for linear in linears
            ]
        )
        spare = count - below
        threshold = float(candidates.kthvalue(spare).values) if spare else -1.0
        spare -= int((candidates < threshold).sum())
        masks = {}
        for linear in linears:
            scores = self.finite_scores(program, linear)
            equal = (scores == threshold).flatten()
            taken = equal & (equal.cumsum(0) <= spare)
            spare -= int(taken.sum())
            keep = ~((scores < threshold) | taken.view(scores.shape))
            masks[linear.name] = Mask(pack_bits(keep), linear.shape, pattern, self.name)
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return program.with_fact(known.merge(Masks(masks)))

    def _upper(self, program: Program, linear: Linear) -> torch.Tensor:
        scores = self.finite_scores(program, linear).contiguous().flatten()
        return scores.view(torch.int32) >> 16
