"""allocate-sparsity: how much each linear is pruned, so that all together have a given sparsity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from zeroskip.ir.allocation import Share, cheapest_shares, level_shares, whole_steps
from zeroskip.ir.budgets import Budgets, Measurements
from zeroskip.ir.errors import PatternError, RecipeError
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import SparsityPattern, Unstructured, parse_pattern, pruned_count
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.sensitivity import error_curve, outlier_share, output_errors
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import Pass
from zeroskip.passes.manager import PassManager
from zeroskip.passes.observe import Observe
from zeroskip.passes.pattern_pass import PatternPass, saw_too_little

Method = Literal["owl", "sensitivity"]

# Error curves are drawn with so many pieces.
POINTS = 200


@dataclass(frozen=True)
class AllocateSparsity(Pass):
    """Gives each linear a sparsity of its own; together they have the one asked for, exactly.

    The calibration data runs once through the unpruned program, layer by layer, so that no more
    than one layer's statistics are in memory. No number changes: pruners that come later obey the
    `Budgets` where their pattern is unstructured.

    `sensitivity`: the relative output error of each linear, tr(D G D^T) / tr(W G W^T) with
    G = E[x x^T] and D what Wanda would prune, at several sparsities. Budgets are those under which
    the errors sum to the least.

    `owl`: a layer keeps the more, the larger the share of its scores |W_ij| * ||x_j|| above
    `threshold` times their mean; the same within a layer. Kept shares differ by at most
    2 * `spread`. Layers are weighted by their size (the published code does not, and so misses the
    sparsity where they differ).

    An expert that few calibration tokens reached gets the sparsity asked for, with a warning.

    Refuses N:M, blocks and comparison across linears, bounds that do not hold the sparsity, a
    weight with NaN or inf, and a program without calibration data.

    Args:
        sparsity: Of all selected linears together: `60%`, or `60% matrix` for a pruner that compares
            within each linear.
        method: `owl` or `sensitivity`; on SmolLM2 at 70 % `owl` is better than one budget for all,
            `sensitivity` worse.
        threshold: M of OWL: from how many times the mean on a score is an outlier.
        spread: lambda of OWL: half of what kept shares differ by.
        low: Least sparsity of any linear.
        high: Greatest sparsity of any linear.
        probes: Sparsities at which errors are measured, rising.
        include: Patterns of linears, as for the pruner.
        exclude: Patterns of linears to leave out.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Budgets

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175, section 3.
    Sensitivity curves under a budget are common; these are ours.
    """

    sparsity: str | SparsityPattern = "50%"
    method: Method = "owl"
    threshold: float = 5.0
    spread: float = 0.08
    low: float = 0.0
    high: float = 0.95
    probes: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "allocate-sparsity"
    provides = (Budgets,)

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.sparsity)
        if not isinstance(pattern, Unstructured) or pattern.comparison == "global":
            raise PatternError(
                f"{pattern} leaves nothing to allocate",
                pass_name=self.name,
                next_step='write "60%" (per row) or "60% matrix"',
            )
        object.__setattr__(self, "sparsity", str(pattern))
        object.__setattr__(self, "probes", tuple(self.probes))
        rising = (0.0, *self.probes, 1.0)
        problems = {
            "method": self.method in ("owl", "sensitivity"),
            "threshold": self.threshold > 0,
            "spread": 0 <= self.spread < 0.5,
            "low": 0 <= self.low < 1,
            "high": 0 <= self.high < 1,
            "probes": all(a < b for a, b in pairwise(rising)),
        }
        self._refuse_unless(problems)
        if not self.low <= pattern.sparsity <= self.high:
            raise RecipeError(
                f"linears between {self.low} and {self.high} cannot have a sparsity of "
                f"{pattern.sparsity} together",
                pass_name=self.name,
                next_step="choose low <= sparsity <= high",
            )

    @property
    def _target(self) -> Unstructured:
        pattern = parse_pattern(self.sparsity)
        assert isinstance(pattern, Unstructured)
        return pattern

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)

    def warning(self, later: Sequence[Pass]) -> str | None:
        pruner = next((step for step in later if isinstance(step, PatternPass)), None)
        if pruner is None:
            return f"{self.name} changes nothing: no pruner comes after it"
        pattern = parse_pattern(pruner.pattern)
        if not isinstance(pattern, Unstructured):
            return (
                f"{self.name} changes nothing: {pruner.name} at {pattern} prunes every linear "
                "alike, whatever its budget"
            )
        if pattern.comparison == "global":
            return f"{self.name} changes nothing: {pruner.name} at {pattern} makes its own budgets"
        if pattern != self._target:
            return (
                f"{self.name} makes budgets for {self.sparsity}, which {pruner.name} obeys in "
                f"place of its own {pattern}"
            )
        return None

    def run(self, program: Program) -> Program:
        linears = select_linears(program, self.include, self.exclude)
        if not linears:
            return program.with_fact(program.facts.get(Budgets, Budgets()))
        measured = self._measure(program)
        self._warn_of_unseen([n.name for n in linears if n.name not in measured])
        steps = self._allocate(linears, measured)
        budgets = {
            linear.name: _sparsity(given, self._steps(linear))
            for linear, given in zip(linears, steps, strict=True)
        }
        known = program.facts.get(Budgets, Budgets())
        assert isinstance(known, Budgets)
        return program.with_fact(known.merge(Budgets(budgets)))

    def _measure(self, program: Program) -> dict[str, tuple[float, ...]]:
        """Runs the calibration data through the program as it is, one stage in memory at a time."""
        observe = Observe(self.method == "sensitivity", self.include, self.exclude)
        measure = _Measure(
            self._target, self.include, self.exclude, self.method, self.threshold, self.probes
        )
        bare = program.without_facts([Statistics, Measurements])
        measured = PassManager([observe, measure])(bare).program
        return dict(measured.fact(Measurements).values)

    def _steps(self, linear: Linear) -> int:
        """Steps that would prune all of a linear: see `zeroskip.ir.allocation`."""
        by_row = self._target.comparison == "row"
        return linear.in_features if by_row else linear.in_features * linear.out_features

    def _allocate(
        self, linears: Sequence[Linear], measured: dict[str, tuple[float, ...]]
    ) -> list[int]:
        goal = self._target.sparsity
        shares, seen = [], []
        for index, linear in enumerate(linears):
            steps = self._steps(linear)
            low, high = self.low, self.high
            if linear.name in measured:
                seen.append(index)
            else:
                low = high = goal
            size = linear.in_features * linear.out_features
            bounds = [pruned_count(bound, steps) for bound in (low, high)]
            shares.append(Share(size // max(steps, 1), steps, *bounds))
        total = pruned_count(goal, sum(share.weights for share in shares))
        fixed = sum(s.step * s.low for i, s in enumerate(shares) if i not in set(seen))
        wanted = [float(share.low) for share in shares]
        rest, open_ = [shares[i] for i in seen], total - fixed
        values = [measured[linears[i].name] for i in seen]
        if not seen:
            found: list[float] = []
        elif self.method == "sensitivity":
            curves = [error_curve(errors, self.probes, POINTS) for errors in values]
            found = cheapest_shares(curves, rest, open_)
        else:
            found = level_shares(self._offsets([v for (v,) in values]), rest, open_)
        for index, given in zip(seen, found, strict=True):
            wanted[index] = given
        return whole_steps(wanted, shares, total)

    def _offsets(self, outliers: Sequence[float]) -> list[float]:
        """What OWL prunes of each linear, up to a constant: less where outliers are many."""
        least, most = min(outliers), max(outliers)
        if most == least:
            warnings.warn(
                f"{self.name} gives every linear the same: all layers have as many outliers, or "
                "the program is one layer",
                stacklevel=2,
            )
            return [0.0] * len(outliers)
        return [-2 * self.spread * (x - least) / (most - least) for x in outliers]

    def _warn_of_unseen(self, unseen: Sequence[str]) -> None:
        if unseen:
            shown = ", ".join(unseen[:4]) + (f" and {len(unseen) - 4} more" if unseen[4:] else "")
            warnings.warn(
                f"{self.name} gives {shown} the sparsity {self.sparsity}: too few tokens of the "
                "calibration data reached them; calibrate on more",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Measure(PatternPass):
    """Measures the linears of one stage and drops their statistics."""

    method: Method = "sensitivity"
    threshold: float = 5.0
    probes: tuple[float, ...] = ()

    name = "allocate-sparsity"
    requires = (Statistics,)
    provides = (Measurements,)
    invalidates = (Statistics,)

    def run(self, program: Program) -> Program:
        statistics = program.fact(Statistics)
        linears = [
            linear
            for linear in select_linears(program, self.include, self.exclude)
            if not saw_too_little(linear, statistics.of(linear.name))
        ]
        if self.method == "owl":
            share = self._outliers(program, linears)
            return program.with_fact(Measurements({n.name: (share,) for n in linears}))
        target = parse_pattern(self.pattern)
        assert isinstance(target, Unstructured)
        values = {}
        for linear in linears:
            weight = self.finite_weight(program, linear)
            gram = statistics.gram_of(linear.name)
            values[linear.name] = output_errors(weight, gram, self.probes, target)
        return program.with_fact(Measurements(values))

    def _outliers(self, program: Program, linears: Sequence[Linear]) -> float:
        statistics = program.fact(Statistics)
        scores = [
            self.finite_weight(program, linear).abs()
            * statistics.of(linear.name).root_mean_square()
            for linear in linears
        ]
        return outlier_share(scores, self.threshold)


def _sparsity(given: int, steps: int) -> float:
    """Returns the share of which pruners prune exactly so many of the steps."""
    share = given / max(steps, 1)
    while pruned_count(share, steps) < given:
        share = math.nextafter(share, 1.0)
    return share
