"""Pruner: what all passes share that choose masks. A pruner decides; it changes no number."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch

from zeroskip.ir import process_group
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Mask, Masks
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.selection import select_linears
from zeroskip.ir.statistics import ScoreMultipliers, Statistics
from zeroskip.ir.weights import all_finite, pack_bits
from zeroskip.passes.pattern_pass import PatternPass, saw_too_little, warn_of_few_tokens


@dataclass(frozen=True)
class Pruner(PatternPass):
    """Chooses a mask for each linear from a score of its weights.

    An expert that few calibration tokens reached is scored by magnitude, with a warning.
    """

    provides = (Masks,)

    @abstractmethod
    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        """Returns float32 [out, in]: how much each weight matters, higher is more.

        Args:
            program: Gives the facts.
            linear: Which linear.
            weight: Its weight as float32 [out, in].
        """

    def run(self, program: Program) -> Program:
        """Scores every selected linear and projects the scores on the pattern."""
        linears = select_linears(program, self.include, self.exclude)
        warn_of_few_tokens([n.name for n in linears if self._is_unseen(program, n)], self.name)
        # Processes that share the compilation share the linears out, then tell each other.
        owners = process_group.share_out([math.prod(linear.shape) for linear in linears])
        patterns = [self.pattern_of(program, linear) for linear in linears]
        found = [
            pack_bits(pattern.project(self.finite_scores(program, linear)))
            if owner == process_group.rank()
            else torch.empty(-(-math.prod(linear.shape) // 8), dtype=torch.uint8)
            for linear, pattern, owner in zip(linears, patterns, owners, strict=True)
        ]
        masks = {}
        for linear, pattern, owner, own in zip(linears, patterns, owners, found, strict=True):
            bits = process_group.from_owner(own, owner)
            masks[linear.name] = Mask(bits, linear.shape, pattern, self.name)
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return program.with_fact(known.merge(Masks(masks)))

    @final
    def finite_scores(self, program: Program, linear: Linear) -> torch.Tensor:
        """Returns the scores of a linear, steered where `ScoreMultipliers` are known for it.

        Raises:
            CompileError: The weight, or a score, is NaN or infinite; names the linear.
        """
        weight = self.finite_weight(program, linear)
        if self._is_unseen(program, linear):
            return weight.abs()
        scores = self.scores(program, linear, weight)
        known = program.facts.get(ScoreMultipliers)
        if isinstance(known, ScoreMultipliers) and linear.name in known.linears:
            scores = scores * known.linears[linear.name].multipliers
        if not all_finite(scores):
            raise CompileError(
                "the scores overflow",
                where=linear.name,
                pass_name=self.name,
                next_step="look for extreme weights or activations in this linear",
            )
        return scores

    def _is_unseen(self, program: Program, linear: Linear) -> bool:
        if Statistics not in self.requires:
            return False
        edge = program.fact(Statistics).edges.get(linear.name)
        return edge is not None and saw_too_little(linear, edge)
