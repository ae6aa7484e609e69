"""Draws the results of `cpu_model.py`, `methods.py` and `elastic.py`."""

from __future__ import annotations

import math
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


def plot_perplexities(rows: Sequence[Row], path: Path) -> bool:
    """Writes a picture of perplexity against density, a panel for each text.

    Args:
        rows: Cells of `methods.py`; those with a note instead of results are left out.
        path: The PNG.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cells = [row for row in rows if "note" not in row]
    texts = list(cells[0]["negative_log_likelihood"])
    methods = list(dict.fromkeys(row["method"] for row in cells if row["method"] != "dense"))
    figure = Figure(figsize=(6.5 * len(texts), 5.5), layout="constrained")
    for axes, text in zip(_panels(figure, texts), texts, strict=True):
        for index, method in enumerate(methods):
            found = [row for row in cells if row["method"] == method]
            for is_grouped, marker in ((False, "o-"), (True, "x")):
                chosen = [row for row in found if (":" in row["pattern"]) == is_grouped]
                points = sorted(
                    (row["density"], math.exp(row["negative_log_likelihood"][text]))
                    for row in chosen
                )
                label = method if not is_grouped else None
                if points:
                    axes.plot(
                        *zip(*points, strict=True), marker, color=f"C{index % 10}", label=label
                    )
        for row in cells:
            if row["method"] == "dense":
                level = math.exp(row["negative_log_likelihood"][text])
                axes.axhline(level, color="black", linestyle=":", label="dense")
        _label(axes, text, "share of weights kept (crosses: N:M)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    return True


def plot_elastic(rows: Sequence[Row], path: Path) -> bool:
    """Writes a picture of perplexity against sparsity, a panel for each text.

    Args:
        rows: Cells of `elastic.py`.
        path: The PNG.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    texts = list(rows[0]["log_perplexity"])
    figure = Figure(figsize=(6.5 * len(texts), 4.5), layout="constrained")
    for axes, text in zip(_panels(figure, texts), texts, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted(
                (row["sparsity"], math.exp(row["log_perplexity"][text]))
                for row in rows
                if row["method"] == method
            )
            axes.plot(*zip(*points, strict=True), "o-", label=method, markersize=4)
        _label(axes, text, "share of weights pruned")
    figure.axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
    return True


def _panels(figure: Any, texts: Sequence[str]) -> Any:
    """One pair of axes for each text, side by side."""
    return figure.subplots(1, len(texts), squeeze=False).flat


def _label(axes: Any, text: str, meaning: str) -> None:
    """Perplexity of a text, on a scale of ratios, against something."""
    axes.set_title(text)
    axes.set_xlabel(meaning)
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
