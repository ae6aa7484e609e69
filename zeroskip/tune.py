"""The face of `zeroskip tune`: progress while it measures, and what was decided as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zeroskip.ir.errors import CompileError

if TYPE_CHECKING:
    from rich.table import Table

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


def default_threads() -> int:
    """Returns how many cores this process may use: what ONNX Runtime would take, about."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tuned_json(tuned: Tuned) -> dict[str, Any]:
    """Returns what was decided as plain values for JSON."""
    return {
        "linears": {name: verdict.to_json() for name, verdict in tuned.verdicts.items()},
        "changed": list(tuned.changed),
        "distance": tuned.distance,
        "dense_bytes": sum(verdict.dense_bytes for verdict in tuned.verdicts.values()),
        "bytes": sum(_bytes(verdict) for verdict in tuned.verdicts.values()),
    }


def tuned_table(tuned: Tuned) -> Table:
    """Returns the same as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    m_values = sorted({m for verdict in tuned.verdicts.values() for m in verdict.speedup})
    table = Table()
    for heading in ("linear", "shape", "density", "values"):
        table.add_column(heading, overflow="fold")
    table.add_column("dense -> packed", justify="right")
    for m in m_values:
        table.add_column(f"m={m}", justify="right")
    for heading in ("chosen", "why"):
        table.add_column(heading)
    for name, verdict in tuned.verdicts.items():
        mark = " *" if name in tuned.changed else ""
        level = f" (level {verdict.accuracy_level})" if verdict.accuracy_level else ""
        cells = [
            name,
            f"{verdict.rows}x{verdict.columns}",
            f"{verdict.density:.2f}",
            verdict.value_type + level,
            f"{_size(verdict.dense_bytes)} -> {_size(verdict.packed_bytes)}",
            *(_speedup(verdict, m) for m in m_values),
            f"{_chosen(verdict)}{mark}",
            verdict.reason,
        ]
        # Text, not strings: rich would take the brackets of a name for markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def totals(tuned: Tuned, *, dry_run: bool) -> str:
    """Returns the sum of it in a sentence or two."""
    verdicts = tuned.verdicts.values()
    if not verdicts:
        return "No linear here has enough zeros, and enough weights, to run sparse."
    sparse = sum(verdict.choice == "sparse" for verdict in verdicts)
    dense_bytes = sum(verdict.dense_bytes for verdict in verdicts)
    text = (
        f"{sparse} of {len(verdicts)} linears run sparse; "
        f"{_size(dense_bytes)} dense -> {_size(sum(_bytes(verdict) for verdict in verdicts))}"
    )
    extra = sum(verdict.extra_bytes for verdict in verdicts)
    if extra:
        text += f" and {_size(extra)} of memory for repacked ones"
    if dry_run:
        return f"{text}. {len(tuned.changed)} would change (*); nothing was written."
    return f"{text}. {len(tuned.changed)} changed (*)."


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress | None]:
    """Yields what `tune_folder` reports to: a bar on standard error, or None."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield report


def _bytes(verdict: Verdict) -> int:
    return verdict.packed_bytes if verdict.choice == "sparse" else verdict.dense_bytes


def _chosen(verdict: Verdict) -> str:
    if verdict.choice == "dense":
        return "dense"
    return "sparse, repacked" if verdict.layout else "sparse"


def _speedup(verdict: Verdict, m: int) -> str:
    return f"{verdict.speedup[m]:.2f}x" if m in verdict.speedup else ""


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 1 << 30 else f"{count / 2**30:.2f} GiB"
