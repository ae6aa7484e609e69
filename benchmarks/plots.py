"""Draws the results of `cpu_model.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = 3


def plot_models(rows: Sequence[Row], path: Path) -> bool:
    """Writes a picture of all speed-ups; returns False where matplotlib is not installed.

    Args:
        rows: Timed results.
        path: The PNG.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = list(dict.fromkeys((row["model"], row["inputs"], row["threads"]) for row in rows))
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = -(-len(cases) // COLUMNS)
    figure = Figure(figsize=(5.5 * COLUMNS, 4.2 * lines), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    for axes, (model, inputs, threads) in zip(grid.flat, cases, strict=False):
        for index, candidate in enumerate(candidates):
            found = {
                row["pattern"]: row["speedup"]
                for row in rows
                if (row["model"], row["inputs"], row["threads"]) == (model, inputs, threads)
                and row["candidate"] == candidate
            }
            values = [found.get(pattern, float("nan")) for pattern in patterns]
            style = "-o" if candidate.startswith("sparse") else "--"
            axes.plot(
                patterns, values, style, color=f"C{index % 10}", label=candidate, markersize=4
            )
        axes.set_title(f"{model}, {inputs}, {threads} thread{'s' * (threads > 1)}")
        axes.set_ylabel("times the speed of dense float32")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3, which="both")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    return True
