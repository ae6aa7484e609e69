"""Report: what each pass did and what each linear became, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroskip.ir.facts import Lowered, Mask, Roles, SparseWeights
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.induction import Induced
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.program import Program
from zeroskip.linear_table import Row, linear_table, slowest_line, table
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
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float
    note: str
    verdict: Mapping[str, Any] | None = None


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
    """

    passes: list[PassRecord]
    linears: list[LinearReport]
    groups: list[GroupReport]
    stages: list[str]
    seconds: float
    drift: float

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
    """Reads the state of every linear off a compiled program."""
    roles = program.fact(Roles)
    sparse = program.facts.get(SparseWeights, SparseWeights())
    lowered = program.facts.get(Lowered, Lowered())
    assert isinstance(sparse, SparseWeights)
    assert isinstance(lowered, Lowered)
    loaded: dict[str, Any] = {}
    linears = []
    for linear in find_linears(program):
        # Experts share a parameter: load it once, and hold no more than one.
        if linear.parameter not in loaded:
            loaded = {linear.parameter: program.weights[linear.parameter]}
        weight = linear.view(loaded[linear.parameter])
        mask = sparse.masks.get(linear.name)
        linears.append(
            LinearReport(
                name=linear.name,
                shape=linear.shape,
                pattern="dense" if mask is None else str(mask.pattern),
                density=int(weight.count_nonzero()) / max(weight.numel(), 1),
                note=_note(linear, mask, roles, lowered),
                verdict=lowered.verdicts.get(linear.name),
            )
        )
    groups = _group_reports(program)
    return Report(result.records, linears, groups, result.stages, result.seconds, drift)


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
