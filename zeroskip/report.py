"""Report: what each pass did and what each linear became, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroskip.ir.facts import Lowered, Mask, Roles, SparseWeights
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.induction import Induced
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.program import Program
from zeroskip.ir.pruning_error import (
    histogram,
    relative_change,
    root_mean_square,
    sample_weights,
)
from zeroskip.ir.weights import count_nonzero
from zeroskip.linear_table import Row, linear_table, role_of, slowest_line, table
from zeroskip.passes import PassRecord, PipelineResult
from zeroskip.runtime.verdict_24 import table_of


@dataclass(frozen=True)
class LinearReport:
    """The state of one linear.

    Args:
        name: Fully qualified name of its weight.
        shape: (out, in).
        pattern: The pattern it follows, or `dense`.
        density: Share of its weights that are not zero, counted.
        note: Why it is dense, or how it is lowered.
        verdict: What was measured or looked up before choosing how it runs, as
            `zeroskip.runtime.dispatch.Verdict.to_json` writes it; None where nothing was.
        dtype: Of its weight.
        error: How far its output moved when it was pruned, relative to its size, on the calibration
            data; None where nothing was known of its inputs. Later training is not in it.
        change: ||W' - W|| / ||W|| from before the first pass that changes results to the end, on a
            sample of the weights; None where the weight before is not known.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float
    note: str
    verdict: Mapping[str, Any] | None = None
    dtype: str = ""
    error: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class Histogram:
    """How the weights of linears that play the same part in their layers are spread.

    Args:
        role: The last parts of their names.
        linears: How many there are.
        before: Counts of the weights before the first pass that changes results, `BINS` of them
            between -`REACH` and `REACH` root mean squares of the linear; empty where not known.
        after: The same of the compiled weights, zeros left out, in the same units.
    """

    role: str
    linears: int
    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class GroupReport:
    """What became of a group of channel scales.

    Args:
        name: Of the group.
        folded: Whether scales other than 1 are folded into it.
        smallest: The smallest of them; 1 where nothing is folded.
        largest: The largest.
        note: Why nothing was folded, or what it did to the error of its stage.
    """

    name: str
    folded: bool
    smallest: float
    largest: float
    note: str


@dataclass(frozen=True)
class Report:
    """What a compilation did.

    Args:
        passes: One record for each pass, in order.
        linears: Every linear of the program, in order of first use.
        groups: Every group of scales that a pass folded or refused.
        stages: The parts that block-scoped passes ran on.
        seconds: Time for all passes, calibration and checks included.
        drift: Largest ||after - before|| / ||before|| of the program's outputs on the example
            inputs.
        histograms: Of the weights, by the part that linears play.
    """

    passes: list[PassRecord]
    linears: list[LinearReport]
    groups: list[GroupReport]
    stages: list[str]
    seconds: float
    drift: float
    histograms: list[Histogram] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Share of non-zero weights over all linears that follow a pattern; 1 if none does."""
        sizes = [(x.shape[0] * x.shape[1], x.density) for x in self.linears if x.pattern != "dense"]
        total = sum(size for size, _ in sizes)
        return sum(size * density for size, density in sizes) / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values.

        What was measured on a GPU is under `gpu_table`, if anything was: a later process runs by it
        after `zeroskip.runtime.kernels.linear_24.use_table(Table.from_json(...))`.
        """
        passes = [
            {**dataclasses.asdict(record), "options": plain_options(record.options)}
            for record in self.passes
        ]
        linears = [dataclasses.asdict(linear) for linear in self.linears]
        measured = table_of(linear["verdict"] for linear in linears)
        for linear in linears:
            (linear["verdict"] or {}).pop("table", None)
        return {
            "passes": passes,
            "linears": linears,
            **({"gpu_table": measured.to_json()} if measured.entries else {}),
            "scale_groups": [dataclasses.asdict(group) for group in self.groups],
            "stages": self.stages,
            "seconds": self.seconds,
            "drift": self.drift,
            "density": self.density,
            "histograms": [dataclasses.asdict(histogram) for histogram in self.histograms],
        }

    def __str__(self) -> str:
        rows = [
            [
                record.name,
                str(record.stages),
                f"{record.seconds:.2f}",
                "yes" if record.modified else "no",
                "-" if record.drift is None else f"{record.drift:.3g}",
            ]
            for record in self.passes
        ]
        linears = [
            Row(x.name, x.shape, x.density, x.note, x.pattern, x.verdict) for x in self.linears
        ]
        slowest = slowest_line(linears)
        return "\n".join(
            [
                *table(["pass", "parts", "seconds", "modified", "drift"], rows),
                "",
                *linear_table(linears, "note"),
                *([slowest] if slowest else []),
                "",
                *_group_lines(self.groups),
                f"{self.seconds:.1f} s in all",
                f"density of pruned linears {self.density:.4f}",
                f"output drift {self.drift:.3g}",
            ]
        )


def make_report(program: Program, result: PipelineResult, drift: float) -> Report:
    """Reads the state of every linear off a compiled program, each weight once."""
    roles = program.fact(Roles)
    sparse = program.facts.get(SparseWeights, SparseWeights())
    lowered = program.facts.get(Lowered, Lowered())
    assert isinstance(sparse, SparseWeights)
    assert isinstance(lowered, Lowered)
    before = _Before(result)
    loaded: dict[str, Any] = {}
    linears = []
    spreads: dict[str, list[Histogram]] = {}
    for linear in find_linears(program):
        # Experts share a parameter: load it once, and hold no more than one.
        if linear.parameter not in loaded:
            loaded = {linear.parameter: program.weights[linear.parameter]}
        weight = linear.view(loaded[linear.parameter])
        mask = sparse.masks.get(linear.name)
        change, spread = before.compare(linear, weight)
        spreads.setdefault(spread.role, []).append(spread)
        linears.append(
            LinearReport(
                name=linear.name,
                shape=linear.shape,
                pattern="dense" if mask is None else str(mask.pattern),
                density=count_nonzero(weight) / max(weight.numel(), 1),
                note=_note(linear, mask, roles, lowered),
                verdict=lowered.verdicts.get(linear.name),
                dtype=str(weight.dtype).removeprefix("torch."),
                error=None if mask is None else mask.error,
                change=change,
            )
        )
    groups = _group_reports(program)
    histograms = [_sum(same) for same in spreads.values()]
    return Report(result.records, linears, groups, result.stages, result.seconds, drift, histograms)


class _Before:
    """The weights before the first pass that changes results, to compare the compiled ones with."""

    def __init__(self, result: PipelineResult) -> None:
        dense = result.program.dense
        self._weights = None if dense is None else dense.weights
        self._loaded: dict[str, torch.Tensor] = {}

    def compare(self, linear: Linear, after: torch.Tensor) -> tuple[float | None, Histogram]:
        """Returns the relative change of a weight, and how it is spread."""
        role = role_of(linear.name)
        new = sample_weights(after)
        old = self._sample(linear)
        if old is None or old.shape != new.shape:
            return None, Histogram(role, 1, [], histogram(new, root_mean_square(new)))
        unit = root_mean_square(old)
        spread = Histogram(role, 1, histogram(old, unit), histogram(new, unit))
        return relative_change(old, new), spread

    def _sample(self, linear: Linear) -> torch.Tensor | None:
        if self._weights is None or linear.parameter not in self._weights:
            return None
        if linear.parameter not in self._loaded:
            self._loaded = {linear.parameter: self._weights[linear.parameter]}
        return sample_weights(linear.view(self._loaded[linear.parameter]))


def _sum(same: Sequence[Histogram]) -> Histogram:
    """One histogram of many; what was before is known for all of them or not shown."""
    known = all(each.before for each in same)
    before = [sum(counts) for counts in zip(*(each.before for each in same), strict=False)]
    after = [sum(counts) for counts in zip(*(each.after for each in same), strict=True)]
    return Histogram(same[0].role, len(same), before if known else [], after)


def _group_reports(program: Program) -> list[GroupReport]:
    folded = program.facts.get(FoldedScales, FoldedScales())
    induced = program.facts.get(Induced, Induced())
    assert isinstance(folded, FoldedScales)
    assert isinstance(induced, Induced)
    found = []
    for name in sorted({*folded.folds, *folded.refused}):
        fold, note = folded.folds.get(name), folded.refused.get(name, "")
        outcome = induced.outcomes.get(name)
        if fold is not None and outcome is not None and outcome.before is not None:
            note = (
                f"pruning errs by {outcome.after:.3g} with scales, by {outcome.before:.3g} without"
            )
        scales = torch.ones(1) if fold is None else fold.scales.abs()
        found.append(
            GroupReport(name, fold is not None, float(scales.min()), float(scales.max()), note)
        )
    return found


def _group_lines(groups: Sequence[GroupReport]) -> list[str]:
    """How many groups were folded, and the reasons why others were not, each once."""
    if not groups:
        return []
    lines = [f"scales folded into {sum(group.folded for group in groups)} of {len(groups)} groups"]
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if not group.folded:
            reasons.setdefault(group.note, []).append(group.name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        lines.append(f"  not {names[0]}{others}: {reason}")
    return [*lines, ""]


def _note(linear: Linear, mask: Mask | None, roles: Roles, lowered: Lowered) -> str:
    if linear.name in lowered.operators:
        verdict = lowered.verdicts.get(linear.name)
        why = f", {verdict['reason']} ({verdict['source']})" if verdict else ""
        return f"{lowered.operators[linear.name]}{why}"
    if mask is None:
        return roles.role(linear.name) or "not selected"
    return lowered.refusals.get(linear.name, "")


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        if isinstance(value, (str, int, float, bool, type(None)))
        else str(value)
        if isinstance(value, SparsityPattern) or not isinstance(value, (tuple, list))
        else list(value)
        for name, value in options.items()
    }
