"""What pruning would cost each linear: as a table, CSV, JSON and a page."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, parse_pattern
from zeroskip.linear_table import common_name, table, without_numbers

SPARSITIES = "30,40,50,60,70,80,90"
WORST = 8


@dataclass(frozen=True)
class LinearSensitivity:
    """One linear.

    Args:
        name: Of its weight.
        shape: (out, in).
        errors: ||Y' - Y|| / ||Y|| by pattern; None where the pattern does not fit.
    """

    name: str
    shape: tuple[int, int]
    errors: Mapping[str, float | None]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Args:
        model: Its name.
        columns: Texts of the patterns, sparsities first and rising.
        linears: In order of first use.
        unseen: Linears of which the calibration data says too little.
        tokens: Of the calibration data.
        seconds: That it took.
    """

    model: str
    columns: tuple[str, ...]
    linears: tuple[LinearSensitivity, ...]
    unseen: tuple[str, ...]
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "model": self.model,
            "patterns": list(self.columns),
            "measure": "||Y' - Y|| / ||Y|| of each linear alone, pruned as Wanda does",
            "linears": [
                {"name": each.name, "shape": list(each.shape), "errors": dict(each.errors)}
                for each in self.linears
            ],
            "unseen": list(self.unseen),
            "calibration_tokens": self.tokens,
            "seconds": self.seconds,
        }

    def to_csv(self) -> str:
        """Returns a line for each linear."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["linear", "out", "in", *self.columns])
        for each in self.linears:
            found = [each.errors[column] for column in self.columns]
            writer.writerow(
                [each.name, *each.shape, *("" if e is None else f"{e:.6g}" for e in found)]
            )
        return text.getvalue()

    @property
    def reference(self) -> str:
        """The pattern that linears are ranked by: an N:M, or the share nearest to one half."""
        parsed = {column: parse_pattern(column) for column in self.columns}
        structured = [column for column, pattern in parsed.items() if isinstance(pattern, NM)]
        fitting = [c for c in structured if any(x.errors[c] is not None for x in self.linears)]
        shares = {
            column: abs(pattern.sparsity - 0.5)
            for column, pattern in parsed.items()
            if isinstance(pattern, Unstructured)
        }
        return fitting[0] if fitting or not shares else min(shares, key=shares.__getitem__)

    def worst(self) -> list[LinearSensitivity]:
        """Returns the linears that suffer most under the reference pattern, worst first."""
        known = [each for each in self.linears if each.errors[self.reference] is not None]
        return sorted(known, key=lambda each: -float(each.errors[self.reference] or 0))[:WORST]

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[LinearSensitivity]] = {}
        for each in self.linears:
            groups.setdefault((without_numbers(each.name), each.shape), []).append(each)
        rows = [
            [
                common_name([each.name for each in group]),
                f"x {len(group)}" if len(group) > 1 else "",
                *(_range([each.errors[column] for each in group]) for column in self.columns),
            ]
            for group in groups.values()
        ]
        lines = table(["error of", "count", *map(shown, self.columns)], rows)
        lines += ["", f"Most sensitive at {shown(self.reference)}:"]
        lines += [f"  {float(x.errors[self.reference] or 0):.4f}  {x.name}" for x in self.worst()]
        if self.unseen:
            lines += [
                "",
                f"Too few tokens reached {len(self.unseen)} linears: {self.unseen[0]} ...",
            ]
        lines += [
            "",
            (
                "Error: ||Y' - Y|| / ||Y|| of each linear alone, pruned as Wanda does, on "
                f"{self.tokens:,} tokens; {self.seconds:.1f} s"
            ),
        ]
        return "\n".join(lines)


def patterns_of(
    sparsities: str | None, densities: str | None, structured: str | None
) -> tuple[SparsityPattern, ...]:
    """Reads what to measure: lists of percentages or shares, and of N:M patterns.

    Args:
        sparsities: Shares to prune, `50,60` or `0.5,0.6`; None together with densities: `SPARSITIES`.
        densities: Shares to keep, in place of them.
        structured: N:M patterns, `2:4,4:8`.

    Raises:
        CompileError: Both are given, something is no share, or no pattern.
    """
    if sparsities is not None and densities is not None:
        raise CompileError(
            "--sparsities and --densities are given together", next_step="give one of them"
        )
    option = "--densities" if densities is not None else "--sparsities"
    if sparsities is None and densities is None:
        sparsities = SPARSITIES
    text = densities if densities is not None else sparsities
    shares = {_share(part, option) for part in _parts(str(text))}
    if densities is not None:
        shares = {round(1 - share, 12) for share in shares}
    found: list[SparsityPattern] = [Unstructured(share) for share in sorted(shares)]
    for part in _parts(structured or ""):
        pattern = parse_pattern(part)
        if not isinstance(pattern, NM):
            raise PatternError(
                f"--patterns {part} is no N:M pattern",
                next_step="write it like --patterns 2:4,4:8; shares are --sparsities",
            )
        found.append(pattern)
    if not found:
        raise CompileError("there is nothing to measure", next_step="name --sparsities 50,70")
    return tuple(dict.fromkeys(found))


def shown(column: str) -> str:
    """Returns a pattern for people: a share as a percentage."""
    pattern = parse_pattern(column)
    return f"{100 * pattern.sparsity:g}%" if isinstance(pattern, Unstructured) else column


def write_sensitivity(found: Sensitivity, out: Path) -> None:
    """Writes sensitivity.json, .csv and .html into a folder that appears when it is complete.

    Raises:
        ArtifactError: The target is taken, or cannot be written.
    """
    import json

    from zeroskip.ir.folders import new_folder
    from zeroskip.sensitivity_page import sensitivity_page

    with new_folder(out) as folder:
        document = json.dumps(found.to_json(), indent=2, ensure_ascii=False)
        (folder / "sensitivity.json").write_text(document + "\n", encoding="utf-8")
        (folder / "sensitivity.csv").write_text(found.to_csv(), encoding="utf-8")
        (folder / "sensitivity.html").write_text(sensitivity_page(found), encoding="utf-8")


def number_or_none(error: float) -> float | None:
    """Returns an error as JSON knows it: None where the pattern does not fit."""
    return None if math.isnan(error) else error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _share(text: str, option: str) -> float:
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    share = number / 100 if text.endswith("%") or number >= 1 else number
    if not 0 < share < 1:
        raise CompileError(
            f"{option} {text} is no share of weights between 0 and 1",
            next_step=f"write it like {option} 50,70 or {option} 0.5,0.7",
        )
    return round(share, 12)


def _range(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if not known:
        return "does not fit"
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low}-{high}"


def mean_error(linears: Sequence[LinearSensitivity], column: str) -> float:
    """Returns the mean error of linears under a pattern that fits at least one of them."""
    return statistics.mean(e for x in linears if (e := x.errors[column]) is not None)
