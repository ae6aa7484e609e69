"""The figures that the sparse kernels are meant to reach, and which of them a run reached.

Every goal is a ratio to dense float32 ONNX Runtime in the same run unless it names another rival.
A goal over several cases counts by its worst one; in each case the best layout and accuracy level
count, which are what `zeroskip tune` would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
LARGE = ("4096x4096", "4096x11008")
PATTERNS = ("50%", "2:4", "75%", "90%")


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and what was.

    Args:
        name: The case.
        target: The figure to reach.
        value: The figure reached, in the worst case; None where nothing was measured.
        worst: Which case that was.
        at_most: Whether the figure must not be larger; else it must not be smaller.
    """

    name: str
    target: float
    value: float | None
    worst: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it was reached; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def linear_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Yields the goals of `cpu_linear.py`."""
    decode = {
        "50%": {"float32": 1.8, "bfloat16": 3.2, "int8": 5.5},
        "90%": {"float32": 6.4, "bfloat16": 8.9, "int8": 11.0},
    }
    for pattern, targets in decode.items():
        for values, target in targets.items():
            name = f"decode m=1, 4096x4096 and larger, 1 thread, {pattern} {values}"
            cases = _cases(rows, shape=LARGE, m=(1,), threads=(1,), pattern=(pattern,))
            yield _worst(name, target, cases, _best_speedup(values))
    prefill = dict(zip(PATTERNS, (1.45, 1.55, 2.4, 4.2), strict=True))
    for pattern, target in prefill.items():
        name = f"prefill m=128..512, 4096x4096, 1 thread, {pattern} float32"
        cases = _cases(rows, shape=("4096x4096",), m=(128, 512), threads=(1,), pattern=(pattern,))
        yield _worst(name, target, cases, _best_speedup("float32"))
    int8 = dict(zip(PATTERNS, (1.0, 1.0, 1.2, 1.6), strict=True))
    for pattern, target in int8.items():
        name = f"int8 values over ORT dynamic int8, m>=16, {pattern}"
        cases = _cases(rows, m=(16, 128, 512), pattern=(pattern,))
        yield _worst(name, target, cases, _over("ort dynamic int8"))
    for rival, target in (("ort dynamic int8", 1.4), ("ort int4 block 32", 1.3)):
        cases = _cases(rows, m=(1,), pattern=("50%",))
        yield _worst(f"int8 values over {rival}, m=1, 50%", target, cases, _over(rival))


def model_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Yields the goals of `cpu_model.py`."""
    encoder = {
        "1x128": dict(zip(PATTERNS, (1.5, 1.6, 2.3, 3.5), strict=True)),
        "1x16": {"50%": 1.2, "90%": 2.8},
    }
    for inputs, targets in encoder.items():
        for pattern, target in targets.items():
            name = f"encoder {inputs}, 1 thread, {pattern} float32"
            found = _cases(
                rows, model=("encoder",), inputs=(inputs,), threads=(1,), pattern=(pattern,)
            )
            yield _worst(name, target, found, _best_speedup("float32"))
    decoder = (
        ("50%", "float32", 1.75, 0.58),
        ("50%", "bfloat16", 2.7, 0.35),
        ("2:4", "bfloat16", 2.9, 0.34),
    )
    for pattern, values, speed, memory in decoder:
        name = f"decoder, one token, 1 thread, {pattern} {values}"
        cases = _cases(
            rows, model=("decoder",), inputs=("decode",), threads=(1,), pattern=(pattern,)
        )
        yield _worst(name, speed, cases, _best_speedup(values))
        cases = _cases(rows, model=("decoder",), inputs=("memory",), pattern=(pattern,))
        yield _worst(
            f"{name}: memory", memory, cases, _largest(values, "resident_ratio"), at_most=True
        )
    for model in dict.fromkeys(row["model"] for row in rows):
        for key, target, name in (
            ("peak_over_limit", 1.0, "peak while loading over 1.1 x packed size + 100 MB"),
            ("load_ratio", 1.0, "load time over dense"),
        ):
            cases = _cases(rows, model=(model,), inputs=("memory",))
            yield _worst(f"{model}: {name}", target, cases, _largest(None, key), at_most=True)


def print_goals(goals: Iterable[Goal]) -> bool:
    """Prints which goals were met; returns whether none of those measured was missed."""
    table = Table("goal", "target", "reached", "", "worst case", title="goals")
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "not measured"}
    complete = True
    for goal in goals:
        sign = "<=" if goal.at_most else ">="
        reached = "" if goal.value is None else f"{goal.value:.2f}"
        table.add_row(goal.name, f"{sign} {goal.target:g}", reached, words[goal.met], goal.worst)
        complete &= goal.met is not False
    Console(width=160, highlight=False).print(table)
    return complete


Case = tuple[str, list[Row]]
Figure = Callable[[list[Row]], float | None]


def _cases(rows: Sequence[Row], **wanted: Sequence[Any]) -> list[Case]:
    """The rows that have one of the wanted values in each key, a list for each case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if all(row.get(key) in values for key, values in wanted.items()):
            keys = ("model", "shape", "inputs", "m", "threads", "pattern")
            name = " ".join(f"{key}={row[key]}" for key in keys if key in row)
            found.setdefault(name, []).append(row)
    return list(found.items())


def _worst(
    name: str, target: float, cases: Sequence[Case], figure: Figure, *, at_most: bool = False
) -> Goal:
    figures = [(value, case) for case, rows in cases if (value := figure(rows)) is not None]
    if not figures:
        return Goal(name, target, None, at_most=at_most)
    value, case = max(figures) if at_most else min(figures)
    return Goal(name, target, value, case, at_most)


def _best_speedup(values: str) -> Figure:
    def figure(rows: list[Row]) -> float | None:
        return max((row["speedup"] for row in rows if row["values"] == values), default=None)

    return figure


def _over(rival: str) -> Figure:
    """Int8 values against a rival; only where both round activations to 8 bits."""

    def figure(rows: list[Row]) -> float | None:
        rounded = [row for row in rows if row["values"] == "int8" and row["accuracy_level"] == 4]
        best = _best_speedup("int8")(rounded)
        theirs = next((row["speedup"] for row in rows if row["candidate"] == rival), None)
        return None if best is None or theirs is None else best / theirs

    return figure


def _largest(values: str | None, key: str) -> Figure:
    """The largest figure of our candidates that run on the packed weights as they are."""

    def figure(rows: list[Row]) -> float | None:
        found = (
            row[key]
            for row in rows
            if row["values"] and row["layout"] == 0 and values in (None, row["values"])
        )
        return max(found, default=None)

    return figure
