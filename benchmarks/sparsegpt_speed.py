"""SparseGPT of one linear: the published loop and ours, taking turns on the same numbers.

Both get the same weight and the same Hessian, and give a pruned weight; factorisation included.
Times are medians over rounds, of the wall clock and of the processor (all threads); the ratio is the
median of the ratios within a round, so that what else the machine does cancels. The quality of both
results, the squared error of the outputs, is compared too.

    python benchmarks/sparsegpt_speed.py [--sizes 2048 4096] [--patterns "0.5 matrix" 2:4 4:8]
        [--threads 2] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.passes import references  # noqa: E402
from zeroskip.ir.optimal_surgery import hessian_root, prune_columns  # noqa: E402
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, parse_pattern  # noqa: E402
from zeroskip.runtime.machine import cpu_name  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure SparseGPT on one linear.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--patterns", nargs="+", default=["0.5 matrix", "2:4", "4:8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("sparsegpt_speed.json"))
    return parser.parse_args()


def main() -> None:
    """Times every pattern at every size, prints a table, writes JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print(f"{cpu_name()}, {arguments.threads} threads, torch {torch.__version__}")
    print(
        f"{'size':>6} {'pattern':12} {'published s':>12} {'ours s':>8} {'ratio':>6} {'cpu ratio':>9}"
    )
    results = []
    for size in arguments.sizes:
        weight, gram = linear(size)
        for text in arguments.patterns:
            row = {"size": size, "pattern": text, **measure(weight, gram, text, arguments.rounds)}
            results.append(row)
            print(
                f"{size:6} {text:12} {row['published_seconds']:12.2f} {row['ours_seconds']:8.2f} "
                f"{row['ratio']:6.2f} {row['cpu_ratio']:9.2f}",
                flush=True,
            )
    document = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "results": results,
    }
    arguments.json.write_text(json.dumps(document, indent=2), encoding="utf-8")


def linear(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a square weight, and the Gram matrix of correlated inputs, twice as many as wide."""
    generator = torch.Generator().manual_seed(size)
    common = torch.randn(2 * size, 64, generator=generator)
    x = common @ torch.randn(64, size, generator=generator) / 8
    x += torch.randn(2 * size, size, generator=generator)
    return torch.randn(size, size, generator=generator), x.T @ x


def measure(weight: torch.Tensor, gram: torch.Tensor, text: str, rounds: int) -> dict[str, Any]:
    """Runs both in turns, after one round that does not count."""
    pattern = parse_pattern(text)

    def ours() -> torch.Tensor:
        return prune_columns(weight, hessian_root(gram, 0.01), pattern)[0]

    published = published_loop(weight, gram, pattern)
    times: dict[str, list[tuple[float, float]]] = {"published": [], "ours": []}
    errors = {}
    for number in range(rounds + 1):
        for name, run in (("published", published), ("ours", ours)):
            started = time.perf_counter(), time.process_time()
            pruned = run()
            ended = time.perf_counter(), time.process_time()
            if number:
                times[name].append((ended[0] - started[0], ended[1] - started[1]))
            else:
                errors[name] = float(((weight - pruned) @ gram * (weight - pruned)).sum())
    pairs = list(zip(times["published"], times["ours"], strict=True))
    return {
        "published_seconds": statistics.median(wall for wall, _ in times["published"]),
        "ours_seconds": statistics.median(wall for wall, _ in times["ours"]),
        "published_cpu_seconds": statistics.median(cpu for _, cpu in times["published"]),
        "ours_cpu_seconds": statistics.median(cpu for _, cpu in times["ours"]),
        "ratio": statistics.median(a[0] / b[0] for a, b in pairs),
        "cpu_ratio": statistics.median(a[1] / b[1] for a, b in pairs),
        "ratios": [a[0] / b[0] for a, b in pairs],
        "error_ratio": errors["ours"] / errors["published"],
    }


def published_loop(
    weight: torch.Tensor, gram: torch.Tensor, pattern: SparsityPattern
) -> Callable[[], torch.Tensor]:
    """Returns the published algorithm for a share of the matrix or N:M."""
    if isinstance(pattern, NM):
        groups = (pattern.m - pattern.n, pattern.m)
        return lambda: references.sparsegpt(weight, gram, _never, groups)
    if not isinstance(pattern, Unstructured) or pattern.comparison != "matrix":
        raise SystemExit(f"{pattern} was not published: use a share of the matrix, or N:M")
    share = pattern.sparsity

    def choose(start: int, block: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return references.published_share(block, inverse, share)

    return lambda: references.sparsegpt(weight, gram, choose)


def _never(start: int, block: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    raise AssertionError("groups are chosen column by column")


if __name__ == "__main__":
    main()
