"""Seconds and peak memory of each pruning method on one model, dense model in, pruned weights out.

Every method runs in a process of its own, so that one's memory is not another's. Resident memory is
read after the imports, after loading the model, and at its peak. A model that is loaded is mapped:
its pages become resident when they are first read, and count as memory then. With `--from-disk`
nothing is loaded and the weights stay in the checkpoint. Linux only (it reads /proc).

    python benchmarks/prune_time.py [MODEL] [--methods NAME ...] [--samples 32]
        [--sequence-length 512] [--from-disk] [--threads N] [--memory 4GiB] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.runtime.machine import cpu_name

if TYPE_CHECKING:
    from zeroskip.passes import Pass

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
TEXT = ROOT / "examples" / "data" / "calibration.txt"
METHODS = {
    "magnitude 2:4": ("prune-magnitude", "2:4"),
    "magnitude 50%": ("prune-magnitude", "50%"),
    "magnitude 50% global": ("prune-magnitude", "50% global"),
    "wanda 2:4": ("prune-wanda", "2:4"),
    "wanda 50%": ("prune-wanda", "50%"),
}
COLUMNS = {
    "method": "{}",
    "seconds": "{:.1f}",
    "passes_seconds": "{:.1f}",
    "imported_mib": "{:.0f}",
    "loaded_mib": "{:.0f}",
    "peak_mib": "{:.0f}",
    "peak_ratio": "{:.2f}",
    "density": "{:.4f}",
}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; `--worker` is how the script calls itself."""
    parser = argparse.ArgumentParser(description="Measure the pruning methods.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--from-disk", action="store_true", help="leave the weights on disk")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--memory", default="4GiB", help="budget for activations")
    parser.add_argument("--json", type=Path, default=Path("prune_time.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures each method in a fresh process, prints a table, writes JSON."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    results = []
    for method in arguments.methods:
        command = [sys.executable, __file__, str(arguments.model), "--worker"]
        command += ["--methods", method, "--samples", str(arguments.samples)]
        command += ["--sequence-length", str(arguments.sequence_length)]
        command += ["--memory", arguments.memory]
        command += ["--from-disk"] if arguments.from_disk else []
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{method}: the process ended with code {done.returncode}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{method}: {results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    conditions = describe(arguments, results[0])
    print(json.dumps(conditions, indent=2))
    print(table(results))
    document = json.dumps({"conditions": conditions, "results": results}, indent=2)
    arguments.json.write_text(document + "\n", encoding="utf-8")
    print(f"written to {arguments.json}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prunes once and returns what it took; runs in a process of its own."""
    import torch

    from zeroskip import calibration_from_text, compile_sparse, load_model
    from zeroskip.models import load_tokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (method,) = arguments.methods
    calibration = None
    passes = passes_of(method)
    if "observe" in [step.name for step in passes]:
        calibration = calibration_from_text(
            TEXT,
            load_tokenizer(arguments.model),
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
        )
    # What load_model imports is a cost of the imports, not of the model.
    import transformers.modeling_utils  # noqa: F401

    imported = resident()
    started = time.perf_counter()
    source = arguments.model if arguments.from_disk else load_model(arguments.model)[0]
    load_seconds = time.perf_counter() - started
    loaded = resident()
    started = time.perf_counter()
    compiled = compile_sparse(source, passes, calibration=calibration, memory=arguments.memory)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = compiled.program.weights
    fp32 = 4 * sum(weights.source(name).shape.numel() for name in weights)
    report = compiled.report
    return {
        "method": method,
        "seconds": seconds,
        "load_seconds": load_seconds,
        "passes_seconds": report.seconds,
        "each_pass_seconds": {record.name: record.seconds for record in report.passes},
        "parts": len(report.stages) or 1,
        "imported_mib": imported / 2**20,
        "loaded_mib": loaded / 2**20,
        "peak_mib": peak / 2**20,
        "fp32_mib": fp32 / 2**20,
        "peak_ratio": peak / fp32,
        "density": report.density,
        "threads": torch.get_num_threads(),
    }


def passes_of(method: str) -> list[Pass]:
    """The passes of a method, with calibration only where the pruner asks for it."""
    from zeroskip.ir.statistics import Statistics
    from zeroskip.passes import PASSES, ApplyMasks, Observe, Pruner

    name, pattern = METHODS[method]
    kind = PASSES[name]
    assert issubclass(kind, Pruner)
    first: list[Pass] = [Observe()] if Statistics in kind.requires else []
    return [*first, kind(pattern), ApplyMasks()]


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def describe(arguments: argparse.Namespace, first: dict[str, Any]) -> dict[str, Any]:
    """All it takes to measure the same again."""
    return {
        "model": arguments.model.name,
        "fp32_mib": first["fp32_mib"],
        "weights": "on disk" if arguments.from_disk else "live, float32",
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "memory": arguments.memory,
        "threads": first["threads"],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "processor": cpu_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results, one method a line; `peak_ratio` is peak memory over the float32 weights."""
    rows = [list(COLUMNS), *[[f.format(r[c]) for c, f in COLUMNS.items()] for r in results]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(pairs))
        for pairs in ([*zip(row, widths, strict=True)] for row in rows)
    )


if __name__ == "__main__":
    main()
