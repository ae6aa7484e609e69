"""Prints results as tables: a table for each case, a line for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
WIDTH = 120


def print_machine(machine: dict[str, Any]) -> None:
    """Prints what the numbers were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    console = Console(width=WIDTH, highlight=False)
    console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    console.print(" ".join(machine["instruction_sets"]))
    console.print(f"{versions}; load {machine['load_average']:.2f}")


def print_tables(rows: Sequence[Row], case: Sequence[str], column: str) -> None:
    """Prints the speed-up of every candidate over the baseline.

    Args:
        rows: Flat results.
        case: Keys whose values make a table.
        column: The key whose values make its columns.
    """
    console = Console(width=WIDTH, highlight=False)
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in case), []).append(row)
    for key, group in cases.items():
        columns = list(dict.fromkeys(row[column] for row in group))
        title = ", ".join(f"{name} {value}" for name, value in zip(case, key, strict=True))
        table = Table(
            "times the baseline's speed", "ms", *columns, title=title, title_justify="left"
        )
        for name in dict.fromkeys(row["candidate"] for row in group):
            found = {row[column]: row for row in group if row["candidate"] == name}
            cells = [_cell(found.get(value)) for value in columns]
            first = next(iter(found.values()))
            table.add_row(name, f"{first['milliseconds']:.3g}", *cells)
        console.print(table)
        for warning in sorted({warning for row in group for warning in row["warnings"]}):
            console.print(f"  noisy: {warning}", style="yellow")


def print_memory(rows: Sequence[Row]) -> None:
    """Prints sizes and load times, a table for each model."""
    console = Console(width=WIDTH, highlight=False)
    for model in dict.fromkeys(row["model"] for row in rows):
        heads = ("file MB", "resident MB", "of dense", "anonymous", "peak at load", "load s")
        title = f"{model}: memory of a process that ran it once"
        table = Table("pruned", "model", *heads, title=title, title_justify="left")
        for row in (row for row in rows if row["model"] == model):
            sizes = (row["file_bytes"], row["resident"], row["anonymous"], row["peak_load"])
            file, resident, anonymous, peak = (f"{size / 1e6:.0f}" for size in sizes)
            ratio, load = f"{row['resident_ratio']:.2f}", f"{row['load_seconds']:.2f}"
            table.add_row(
                row["pattern"], row["candidate"], file, resident, ratio, anonymous, peak, load
            )
        console.print(table)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    kernel = f" {row['kernel']}" if row.get("kernel") else ""
    return f"{row['speedup']:.2f}{kernel}"
