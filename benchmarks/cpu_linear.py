"""One linear at a time: sparse kernels against dense ONNX Runtime, its quantised forms, and torch.

All forms of a linear take turns in one process, and every figure is a median of ratios within a
round (see `zeroskip.runtime.bench`): CPU time on one thread, wall time on several. Each form has
copies of its weights, used in turn, so many that weights come from memory as in a whole model;
`--hot` keeps one copy, as if a layer had the caches for itself.

    python benchmarks/cpu_linear.py                     a subset, about five minutes
    python benchmarks/cpu_linear.py --full              everything, half an hour
    python benchmarks/cpu_linear.py --shapes 4096x4096 --m 1 --patterns 50% --values float32 int8
    python benchmarks/cpu_linear.py --full --check      also says which goals are met; exit code 1
                                                        if one is not

Shapes are columns x rows, that is inputs x outputs. The results go to cpu_linear.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from goals import linear_goals, print_goals
from linear_candidates import BASELINE, Form, Options, ours, rivals
from models.weights import PATTERNS, keep_mask
from sessions import share_threads
from tables import print_machine, print_tables

from zeroskip.ir.formats import VALUE_TYPES
from zeroskip.runtime.bench import compare
from zeroskip.runtime.machine import cache_bytes, describe_machine

SHAPES = ("768x3072", "2048x2048", "4096x4096", "4096x11008")
ROWS_OF_X = (1, 4, 16, 128, 512)
RIVALS = ("dynamic-int8", "nbits", "torch")
SUBSET = {"shapes": ("768x3072", "4096x4096"), "m": (1, 16, 128), "threads": (1,)}
FULL = {"shapes": SHAPES, "m": ROWS_OF_X, "threads": (1, 2)}
MIB = 2**20
# Calls in a turn: one that is not timed, two that are. More copies than that, and none is used
# twice before every other form had its turn.
SETTLE, CALLS = 1, 2
MIN_COPIES = SETTLE + CALLS + 1


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `--worker` is how the script calls itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every shape, m and thread count")
    parser.add_argument("--shapes", nargs="+", help=f"columns x rows; {' '.join(SHAPES)}")
    parser.add_argument("--m", nargs="+", type=int, help="rows of x")
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="part pruned, or 2:4")
    parser.add_argument("--values", nargs="+", choices=list(VALUE_TYPES), default=list(VALUE_TYPES))
    parser.add_argument("--layouts", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--levels", nargs="+", type=int, choices=(0, 4), default=(4, 0))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--hot", action="store_true", help="one copy of the weights")
    parser.add_argument("--rotate-mib", type=int, help="dense weights in turn; default: 2 x L3")
    parser.add_argument("--rounds", type=int, default=25, help="at most")
    parser.add_argument("--seconds", type=float, default=2.5, help="for one comparison, about")
    parser.add_argument("--direct", action="store_true", help="call the kernels from Python")
    parser.add_argument("--check", action="store_true", help="say which goals are met")
    parser.add_argument("--json", type=Path, default=Path("cpu_linear.json"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    for name, value in (FULL if arguments.full else SUBSET).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Measures each thread count in a process of its own, prints tables, writes JSON."""
    arguments = parse_arguments()
    if arguments.worker is not None:
        for row in measure(arguments, arguments.worker):
            print(json.dumps(row), flush=True)
        return
    machine = describe_machine()
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            rows += [json.loads(line) for line in worker.stdout]
        if worker.returncode:
            sys.exit(f"{threads} threads: the process ended with code {worker.returncode}")
    settings = {name: value for name, value in vars(arguments).items() if name != "worker"}
    document = {
        "benchmark": "cpu_linear",
        "machine": machine,
        "settings": settings,
        "seconds": time.perf_counter() - started,
        "results": rows,
    }
    arguments.json.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    print_machine(machine)
    print_tables(rows, ("threads", "shape", "m"), "pattern")
    print(f"written to {arguments.json}")
    if arguments.check and not print_goals(linear_goals(rows)):
        sys.exit(1)


def measure(arguments: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """Yields one row of results for each form of each case."""
    share_threads(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for shape in arguments.shapes:
        columns, rows = (int(size) for size in shape.split("x"))
        weight = torch.randn(rows, columns) * 0.02
        copies = count_copies(arguments, 4 * rows * columns)
        dense = list(rivals(weight, copies, arguments.rivals))
        for pattern in arguments.patterns:
            pruned = weight * keep_mask(rows, columns, pattern)
            forms = [*dense, *sparse_forms(arguments, pruned, copies, threads)]
            for m in arguments.m:
                case = {"threads": threads, "shape": shape, "m": m, "pattern": pattern}
                print(" ".join(f"{k}={v}" for k, v in case.items()), file=sys.stderr, flush=True)
                yield from time_forms(arguments, case, forms, torch.randn(m, columns), pruned)
            del forms


def count_copies(arguments: argparse.Namespace, dense_bytes: int) -> int:
    """How many copies every form gets: the dense ones alone are larger than the caches."""
    if arguments.hot:
        return 1
    l3 = cache_bytes(3) or 64 * MIB
    rotate = arguments.rotate_mib * MIB if arguments.rotate_mib else 2 * l3
    return max(MIN_COPIES, -(-rotate // dense_bytes))


def sparse_forms(
    arguments: argparse.Namespace, pruned: torch.Tensor, copies: int, threads: int
) -> Iterator[Form]:
    """Yields every form of ours that was asked for; only int8 values have accuracy levels."""
    for values in arguments.values:
        for level in arguments.levels if values == "int8" else (0,):
            for layout in arguments.layouts:
                yield ours(
                    pruned,
                    values,
                    Options(layout, level),
                    copies,
                    threads=threads,
                    direct=arguments.direct,
                )


def time_forms(
    arguments: argparse.Namespace,
    case: dict[str, Any],
    forms: list[Form],
    x: torch.Tensor,
    pruned: torch.Tensor,
) -> Iterator[dict[str, Any]]:
    """Compares all forms at one x [m, columns]; ours are also checked against the pruned weight."""
    threads = case["threads"]
    calls = {form.name: form.bind(x) for form in forms}
    compared = compare(
        calls,
        BASELINE,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        settle=SETTLE,
        calls=CALLS,
        # Threads of torch spin for a while after their work; alone there are none.
        pause=0.001 if threads > 1 else 0.0,
        clock="thread" if threads == 1 else "wall",
    )
    expected = x @ pruned.T
    for form in forms:
        timing = compared.timings[form.name]
        yield {
            **case,
            "candidate": form.name,
            "values": form.values,
            "layout": form.layout,
            "accuracy_level": form.accuracy_level,
            "kernel": form.kernel(case["m"]) if form.kernel else None,
            "through": "python" if arguments.direct or form.values is None else "onnxruntime",
            "bytes": form.bytes,
            "error": relative_error(form, x, expected) if form.values else None,
            "milliseconds": timing.wall.median * 1e3,
            "cpu_milliseconds": timing.process.median * 1e3,
            "speedup": timing.speedup.median,
            "speedup_quartiles": [timing.speedup.low, timing.speedup.high],
            "wall_speedup": timing.wall_speedup.median,
            "rounds": compared.rounds,
            "warnings": compared.noise.warnings,
        }


def relative_error(form: Form, x: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of what a form computes from what it should, relative to that."""
    return float((form.copies[0].compute(x) - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
