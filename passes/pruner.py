"""Pruner: what all pruning passes share. A pruner decides; it changes no number."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.facts import Mask, Masks, ScoreMultipliers
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Pass, Scope


@dataclass(frozen=True)
class Pruner(Pass):
    """Chooses a mask for each linear from a score of its weights.

    Args:
        pattern: `2:4`, `4:8 pad`, `50%`, `0.5 matrix`, `block:16x16:0.5`.
        include: Shell-style patterns of linears to prune. Empty: all but output heads, expert
            routers and weights that something else reads too.
        exclude: Patterns of linears to leave dense.
    """

    pattern: str | SparsityPattern = "50%"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    provides = (Masks,)
    compares_globally: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # One text for one pattern, so that equal passes compare and write equal.
        object.__setattr__(self, "pattern", str(parse_pattern(self.pattern)))

    @property
    def scope(self) -> Scope:
        return "block"

    @property
    def ignores_input_scales(self) -> bool:
        """Whether folding scales into the weights leaves every decision as it is."""
        return False

    @abstractmethod
    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        """Returns float32 [out, in]: how much each weight matters, higher is more.

        Args:
            program: Gives the facts.
            linear: Which linear.
            weight: Its weight as float32 [out, in].
        """

    def check(self, program: Program) -> None:
        """Refuses a pattern that does not fit one of the linears, before anything runs."""
        check_selection(program, self.include, self.exclude)
        pattern = parse_pattern(self.pattern)
        is_global = isinstance(pattern, Unstructured) and pattern.comparison == "global"
        if is_global and not self.compares_globally:
            raise PatternError(
                f"{self.name} scores each linear on a scale of its own; {pattern} compares them",
                pass_name=self.name,
                next_step='use "50%" (per row) or "50% matrix"',
            )
        for linear in select_linears(program, self.include, self.exclude):
            reason = pattern.refusal(linear.shape)
            if reason is not None:
                raise PatternError(
                    f"{pattern} does not fit: {reason}",
                    where=linear.name,
                    pass_name=self.name,
                    next_step=f'leave it dense with exclude=("{linear.name}",)'
                    + (f', or write "{pattern} pad"' if ":" in str(pattern)[:4] else ""),
                )

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def run(self, program: Program) -> Program:
        """Scores every selected linear and projects the scores on the pattern."""
        pattern = parse_pattern(self.pattern)
        masks = {}
        for linear in select_linears(program, self.include, self.exclude):
            keep = pattern.project(self.finite_scores(program, linear))
            masks[linear.name] = Mask(pack_bits(keep), linear.shape, pattern, self.name)
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return program.with_fact(known.merge(Masks(masks)))

    @final
    def finite_scores(self, program: Program, linear: Linear) -> torch.Tensor:
        """Returns the scores of a linear, steered where `ScoreMultipliers` are known for it.

        Raises:
            CompileError: The weight, or a score, is NaN or infinite; names the linear.
        """
        weight = linear.weight(program).float()
        if not torch.isfinite(weight).all():
            row, column = (int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
            raise CompileError(
                f"the weight holds {float(weight[row, column])} at [{row}, {column}]",
                where=linear.name,
                pass_name=self.name,
                next_step="repair the checkpoint; a model with NaN or inf cannot be pruned",
            )
        scores = self.scores(program, linear, weight)
        known = program.facts.get(ScoreMultipliers)
        if isinstance(known, ScoreMultipliers) and linear.name in known.linears:
            scores = scores * known.linears[linear.name].multipliers
        if not torch.isfinite(scores).all():
            raise CompileError(
                "the scores overflow",
                where=linear.name,
                pass_name=self.name,
                next_step="look for extreme weights or activations in this linear",
            )
        return scores
