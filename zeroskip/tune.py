"""The face of `zeroskip tune`: progress while it measures, and what was decided as a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zeroskip.ir.errors import CompileError
from zeroskip.linear_table import Row, linear_table, size, slowest_line

if TYPE_CHECKING:
    from zeroskip.runtime.dispatch import Verdict
    from zeroskip.runtime.onnx.tune import Progress, Tuned


def parse_m(text: str) -> tuple[int, ...]:
    """Returns the row counts of a list such as "1,16,128", in order, each once.

    Raises:
        CompileError: Something in it is no whole number of 1 or more.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CompileError(
            f"--m {text} is no list of row counts", next_step="write it like --m 1,16,128"
        )
    return tuple(sorted({int(part) for part in parts}))


def tuned_json(tuned: Tuned) -> dict[str, Any]:
    """Returns what was decided as plain values for JSON."""
    return {
        "linears": {name: verdict.to_json() for name, verdict in tuned.verdicts.items()},
        "weights": dict(tuned.weights),
        "changed": list(tuned.changed),
        "distance": tuned.distance,
        "dense_bytes": sum(verdict.dense_bytes for verdict in tuned.verdicts.values()),
        "bytes": sum(_bytes(verdict) for verdict in tuned.verdicts.values()),
    }


def tuned_table(tuned: Tuned) -> str:
    """Returns the same as a table, one line for all linears that are alike."""
    return "\n".join(linear_table(_rows(tuned)))


def totals(tuned: Tuned, *, dry_run: bool) -> str:
    """Returns the sum of it in a sentence or two."""
    verdicts = tuned.verdicts.values()
    if not verdicts:
        return "No linear here has enough zeros, and enough weights, to run sparse."
    sparse = sum(verdict.choice == "sparse" for verdict in verdicts)
    dense_bytes = sum(verdict.dense_bytes for verdict in verdicts)
    text = (
        f"{sparse} of {len(verdicts)} linears run sparse; "
        f"{size(dense_bytes)} dense -> {size(sum(_bytes(verdict) for verdict in verdicts))}"
    )
    extra = sum(verdict.extra_bytes for verdict in verdicts)
    if extra:
        text += f" and {size(extra)} of memory for repacked ones"
    changed = f"{len(tuned.changed)} changed (*)"
    if dry_run:
        changed = f"{len(tuned.changed)} would change (*); nothing was written"
    slowest = slowest_line(_rows(tuned))
    return "\n".join([f"{text}. {changed}.", *([slowest] if slowest else [])])


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress | None]:
    """Yields what `tune_folder` reports to: a bar on standard error, or None."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (BarColumn(), MofNCompleteColumn(), TimeLeft(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield report


def _bytes(verdict: Verdict) -> int:
    return verdict.packed_bytes if verdict.choice == "sparse" else verdict.dense_bytes


def _rows(tuned: Tuned) -> list[Row]:
    return [
        Row(
            name=tuned.weights.get(name, name),
            shape=(verdict.rows, verdict.columns),
            density=verdict.density,
            verdict=verdict.to_json(),
            changed=name in tuned.changed,
        )
        for name, verdict in tuned.verdicts.items()
    ]
