"""Draws the results of `gpu_linear.py`: tokens against speed-up over dense, a line for each layer.

python benchmarks/gpu_plots.py docs/measurements/h200-gpu-linear.json gpu_linear.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOALS = ((1, 16, 1.5), (32, 64, 1.3), (1024, 4096, 1.4))
"""From and to how many tokens which speed-up is aimed at, for layers of 32 MB and more."""


def plot_linears(result: dict[str, Any], path: Path) -> None:
    """Writes the picture.

    Args:
        result: What `gpu_linear.py` wrote.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for at, shape in enumerate(result["shapes"]):
        tokens = [each["tokens"] for each in shape["winners"]]
        speedups = [each["speedup"] for each in shape["winners"]]
        label = f"{shape['rows']} x {shape['columns']}"
        axes.plot(tokens, speedups, "o-", color=f"C{at}", label=label, markersize=4)
    for low, high, goal in GOALS:
        axes.plot([low, high], [goal, goal], color="black", linestyle="--", linewidth=1)
    axes.plot([], [], color="black", linestyle="--", label="goals")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("times the speed of cuBLAS; 1: dense is taken")
    machine = result["machine"]
    axes.set_title(
        f"2:4 bfloat16 on {machine['device']}, torch {machine['torch']}, {machine['date']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    plot_linears(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
