"""PatternPass: what all passes share that bring linears under a sparsity pattern."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from zeroskip.ir.budgets import Budgets
from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers
from zeroskip.ir.weights import all_finite
from zeroskip.passes.base import Pass, Scope

# An expert that saw fewer tokens than this is pruned by magnitude.
FEW_TOKENS = 16


@dataclass(frozen=True)
class PatternPass(Pass):
    """Brings each selected linear under a sparsity pattern, stage by stage.

    Args:
        pattern: `2:4`, `4:8 pad`, `50%`, `0.5 matrix`, `block:16x16:0.5`.
        include: Shell-style patterns of linears to prune. Empty: all but output heads, expert
            routers and weights that something else reads too.
        exclude: Patterns of linears to leave dense.
    """

    pattern: str | SparsityPattern = "50%"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

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

    def pattern_of(self, program: Program, linear: Linear) -> SparsityPattern:
        """Returns what one linear is pruned to: the pattern, or what `Budgets` say of it."""
        pattern = parse_pattern(self.pattern)
        known = program.facts.get(Budgets, Budgets())
        assert isinstance(known, Budgets)
        if not isinstance(pattern, Unstructured) or linear.name not in known.sparsities:
            return pattern
        return Unstructured(known.sparsities[linear.name], pattern.comparison)

    def finite_weight(self, program: Program, linear: Linear) -> torch.Tensor:
        """Returns the weight as float32 [out, in].

        Raises:
            CompileError: It holds NaN or infinity; names the linear.
        """
        weight = linear.weight(program).float()
        if not all_finite(weight):
            row, column = (int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
            raise CompileError(
                f"the weight holds {float(weight[row, column])} at [{row}, {column}]",
                where=linear.name,
                pass_name=self.name,
                next_step="repair the checkpoint; a model with NaN or inf cannot be pruned",
            )
        return weight


def next_unmoved_by_scales(later: Sequence[Pass]) -> PatternPass | None:
    """Returns the next pruner if nothing that it decides depends on scales folded before it.

    What steers its scores or says how much it keeps sees the weights as they are, rows too.
    """
    for step in later:
        if ScoreMultipliers in step.provides or Budgets in step.provides:
            return None
        if isinstance(step, PatternPass):
            return step if step.ignores_input_scales else None
    return None


def saw_too_little(linear: Linear, edge: EdgeStatistics) -> bool:
    """Whether calibration says next to nothing about a linear: no token, or an expert with few."""
    return edge.count < (FEW_TOKENS if linear.expert is not None else 1)


def warn_of_few_tokens(linears: list[str], name: str) -> None:
    """Says which linears were pruned by magnitude for want of calibration data."""
    if linears:
        shown = ", ".join(linears[:4]) + (f" and {len(linears) - 4} more" if linears[4:] else "")
        warnings.warn(
            f"{name} prunes {shown} by magnitude: fewer than {FEW_TOKENS} tokens of the "
            "calibration data reached them; calibrate on more",
            stacklevel=3,
        )
