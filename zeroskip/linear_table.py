"""What became of each linear, as a table for people: layers that fared alike share a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroskip.ir.errors import PatternError
from zeroskip.ir.patterns import Unstructured, parse_pattern

COLUMNS = (
    "linear",
    "count",
    "out x in",
    "pattern",
    "density",
    "values",
    "dense -> packed",
    "speed @ m",
    "chosen",
)
MOST_RANGES = 4
# A number that is a name of its own, as in `layers.3.mlp` and `experts[3]`, but not in `fc1`.
_NUMBER = re.compile(r"(?<![^\W_])(\d+)(?![^\W_])")


@dataclass(frozen=True)
class Row:
    """One linear.

    Args:
        name: Of its weight.
        shape: (out, in).
        density: Share of its weights that are not zero.
        note: What is to be said where there is no verdict.
        pattern: The pattern of its zeros; empty where it is not known.
        verdict: As `Verdict.to_json` writes it; None where nothing was to be decided.
        changed: Whether it is to be marked.
    """

    name: str
    shape: tuple[int, int]
    density: float
    note: str = ""
    pattern: str = ""
    verdict: Mapping[str, Any] | None = None
    changed: bool = False

    @property
    def speedups(self) -> dict[int, float]:
        """The speed-up by m, as far as it is known."""
        known = self.verdict["speedup"] if self.verdict else {}
        return {int(m): float(speedup) for m, speedup in known.items()}

    @property
    def lowest(self) -> float:
        """The lowest speed-up; infinite where none is known."""
        return min(self.speedups.values(), default=float("inf"))

    @property
    def is_judged_sparse(self) -> bool:
        return self.verdict is not None and self.verdict["choice"] == "sparse"


def linear_table(rows: Sequence[Row], column: str = "chosen") -> list[str]:
    """Returns the lines of a table of linears, and below it what its speeds mean.

    Linears whose names differ in numbers alone share a line where they have the same shape and
    became the same thing; what differs among them is a range, and bytes are those of all.

    Args:
        rows: In the order in which they are to appear.
        column: The heading of the last column.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    cells = [_cells(group) for group in groups.values()]
    used = [i for i in range(len(COLUMNS)) if i in (0, 8) or any(line[i] for line in cells)]
    head = [column if i == 8 else COLUMNS[i] for i in used]
    lines = table(head, [[line[i] for i in used] for line in cells])
    return [*lines, *_legend(rows)]


def slowest_line(rows: Sequence[Row]) -> str | None:
    """Returns a sentence about the slowest linear that was judged to run sparse; None without any."""
    judged = [row for row in rows if row.is_judged_sparse and row.speedups]
    if not judged:
        return None
    slowest = min(judged, key=lambda row: row.lowest)
    m = min(slowest.speedups, key=slowest.speedups.__getitem__)
    return f"The slowest of the sparse ones: {slowest.lowest:.2f}x at m={m}, {slowest.name}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in plain text."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def size(count: int) -> str:
    """Returns a number of bytes for people."""
    if count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 1 << 30 else f"{count / 2**30:.2f} GiB"


def _kind(row: Row) -> tuple[object, ...]:
    """What linears on one line have in common; speeds, which may differ a little, are not in it."""
    name = without_numbers(row.name)
    verdict = row.verdict
    own = _unstructured(row.pattern)
    pattern = row.pattern if own is None else own.comparison
    if verdict is None:
        return (name, row.shape, pattern, row.changed, row.note)
    decided = tuple(verdict[key] for key in ("value_type", "accuracy_level", "choice", "layout"))
    # Without speeds, the reason is what there is to know.
    reason = None if verdict["speedup"] else _reason(row)
    known = (verdict["source"], tuple(verdict["speedup"]))
    return (name, row.shape, pattern, row.changed, *decided, *known, reason)


def _cells(group: Sequence[Row]) -> list[str]:
    first = group[0]
    densities = [row.density for row in group]
    values = packed = speeds = ""
    if first.verdict is not None:
        level = f" (level {first.verdict['accuracy_level']})"
        values = first.verdict["value_type"] + (level if first.verdict["accuracy_level"] else "")
        sums = [
            sum(int(row.verdict[key]) for row in group if row.verdict)
            for key in ("dense_bytes", "packed_bytes")
        ]
        packed = f"{size(sums[0])} -> {size(sums[1])}"
        speeds = ", ".join(
            f"{_range([row.speedups[m] for row in group], 2)}x @{m}" for m in first.speedups
        )
    return [
        common_name([row.name for row in group]),
        f"x {len(group)}" if len(group) > 1 else "",
        f"{first.shape[0]} x {first.shape[1]}",
        _pattern(group),
        _range(densities, 4),
        values,
        packed,
        speeds,
        _chosen(min(group, key=lambda row: row.lowest)),
    ]


def _pattern(group: Sequence[Row]) -> str:
    """The pattern of all, or the range of their sparsities where each has its own."""
    texts = dict.fromkeys(row.pattern for row in group)
    own = [found for text in texts if (found := _unstructured(text)) is not None]
    if not own or (len(texts) == 1 and len(group[0].pattern) <= len("0.1234 matrix")):
        return group[0].pattern
    comparison = "" if own[0].comparison == "row" else f" {own[0].comparison}"
    return _range([pattern.sparsity for pattern in own], 4) + comparison


def _unstructured(text: str) -> Unstructured | None:
    """Reads a pattern that is a share of weights; None for another, `dense` or none."""
    try:
        found = parse_pattern(text)
    except PatternError:
        return None
    return found if isinstance(found, Unstructured) else None


def _chosen(row: Row) -> str:
    if row.verdict is None:
        return row.note
    mark = " *" if row.changed else ""
    if not row.is_judged_sparse:
        return f"dense{mark or ' kept'}: {_reason(row)}"
    layout = ", repacked" if row.verdict["layout"] else ""
    return f"sparse{layout}{mark}: {_reason(row)}"


def _reason(row: Row) -> str:
    return str(row.verdict["reason"]) if row.verdict else row.note


def _legend(rows: Sequence[Row]) -> list[str]:
    """What the speeds refer to; one line for each rival and source."""
    verdicts = [row.verdict for row in rows if row.verdict and row.verdict["speedup"]]
    kinds = dict.fromkeys((v["rival"], v["source"], v["threads"]) for v in verdicts)
    lines = []
    for rival, source, threads in kinds:
        plural = "" if threads == 1 else "s"
        on_cpu = f" with {threads} thread{plural}" if threads else ""
        if source == "measured":
            whence = f"measured on this machine{on_cpu}"
        elif on_cpu:
            whence = "not measured: the lowest that the table of the package knows"
        else:
            whence = "by the tables of what was measured before"
        lines.append(f"speed @ m: of dense in {rival}, with m rows (batch x tokens); {whence}")
    return ["", *lines] if lines else []


def _range(numbers: Sequence[float], digits: int) -> str:
    low, high = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return low if low == high else f"{low}-{high}"


def without_numbers(name: str) -> tuple[str, ...]:
    """Returns what lies between the numbers of a name: the same for linears of like layers."""
    return tuple(_NUMBER.split(name)[::2])


def layer_of(name: str) -> int | None:
    """Returns the first number in a name, which is that of its layer; None without one."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def role_of(name: str) -> str:
    """Returns what a linear is in its layer: what follows the first number, or the whole name.

    Experts count as one: `layers.3.mlp.experts.7.w1.weight` is `mlp.experts.*.w1`.
    """
    found = _NUMBER.search(name)
    rest = name[found.end() :].lstrip("].") if found else name
    return _NUMBER.sub("*", rest.removesuffix(".weight")) or name


def common_name(names: Sequence[str]) -> str:
    """Returns the name of several that differ in numbers alone: `layers.0-29.mlp` where the numbers are without gaps."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(_NUMBER.split(name) for name in names), strict=True)
    return "".join(
        part if len({part, *column}) == 1 else _numbers({int(each) for each in (part, *column)})
        for part, *column in columns
    )


def _numbers(found: Collection[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(found):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    if len(ranges) > MOST_RANGES:
        return "*"
    return ",".join("-".join(map(str, each)) for each in ranges)
