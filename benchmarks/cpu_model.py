"""Whole models: sparse weights in ONNX Runtime against dense, quantised, torch and DeepSparse.

    encoder     four layers of the shape of BERT-base, 1x128, 4x128 and 1x16 tokens
    decoder     six blocks like LLaMA's (308 million weights) with a cache of 128 tokens
    smollm2     SmolLM2-135M as zeroskip exports it, with its cache; needs `make models`

    python benchmarks/cpu_model.py                          encoder and decoder, one thread
    python benchmarks/cpu_model.py --models smollm2 --threads 1 2 --work build/bench
    python benchmarks/cpu_model.py --check                  also says which goals are met; exit
                                                            code 1 if one is not

Everything takes turns in one process, and figures are medians of ratios within a round to dense
float32 ONNX Runtime. Memory is that of a process of its own that opens the model and runs it once.
Weights are random, and so are the masks. Writes cpu_model.json and, with matplotlib installed,
cpu_model.png. `--work` names a folder that keeps the models (12 GB) for the next time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from deepsparse_rival import DeepSparse
from goals import model_goals, print_goals
from model_cases import Inputs, ModelCase, decoder_case, encoder_case, smollm2_case
from model_files import BASELINE, ModelFile, ModelFiles
from models.weights import PATTERNS, file_bytes, prune
from plots import plot_models
from sessions import bound_run, open_session, share_threads
from tables import print_machine, print_memory, print_tables

from zeroskip.runtime.bench import compare
from zeroskip.runtime.machine import describe_machine
from zeroskip.runtime.onnx.custom_ops import custom_ops_path
from zeroskip.runtime.resident import Residence, measure_residence

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "smollm2-135m-instruct"
MODELS = ("encoder", "decoder", "smollm2")
RIVALS = ("dynamic-int8", "nbits", "torch")
# What peak memory while loading is held against: the packed size, times this, plus this.
PEAK_FACTOR, PEAK_EXTRA = 1.1, 100e6
PAUSE = 0.002


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `--worker` is how the script calls itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    parser.add_argument("--inputs", nargs="+", help='such as 1x128, decode or "prefill 128"')
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="part pruned, or 2:4")
    parser.add_argument("--values", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--layouts", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--deepsparse-python", type=Path, help="an interpreter that has DeepSparse")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="for one comparison, about")
    parser.add_argument("--loads", type=int, default=3, help="processes for memory; 0: no memory")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="SmolLM2")
    parser.add_argument("--work", type=Path, help="a folder for the models; default: temporary")
    parser.add_argument("--tiny", action="store_true", help="minute models, to try the script")
    parser.add_argument("--check", action="store_true", help="say which goals are met")
    parser.add_argument("--json", type=Path, default=Path("cpu_model.json"))
    parser.add_argument("--plot", type=Path, default=Path("cpu_model.png"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Measures each thread count in a process of its own; prints, plots, writes JSON."""
    arguments = parse_arguments()
    if arguments.worker is not None:
        for row in measure(arguments, arguments.worker):
            print(json.dumps(row), flush=True)
        return
    machine = describe_machine()
    started = time.perf_counter()
    with ExitStack() as stack:
        if arguments.work is None:
            arguments.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = [row for threads in arguments.threads for row in _worker(arguments.work, threads)]
    document = {
        "benchmark": "cpu_model",
        "machine": machine,
        "settings": vars(arguments),
        "seconds": time.perf_counter() - started,
        "results": rows,
    }
    arguments.json.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    print_machine(machine)
    timed = [row for row in rows if row["inputs"] != "memory"]
    print_tables(timed, ("model", "threads", "inputs"), "pattern")
    print_memory([row for row in rows if row["inputs"] == "memory"])
    print(f"written to {arguments.json}")
    if plot_models(timed, arguments.plot):
        print(f"written to {arguments.plot}")
    else:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    if arguments.check and not print_goals(model_goals(rows)):
        sys.exit(1)


def _worker(work: Path, threads: int) -> Iterator[dict[str, Any]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(threads)]
    command += ["--work", str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            yield json.loads(line)
    if worker.returncode:
        sys.exit(f"{threads} threads: the process ended with code {worker.returncode}")


def measure(arguments: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """Yields a row of results for each form of each model at each of its inputs."""
    share_threads(threads)
    torch.set_num_threads(threads)
    for name in arguments.models:
        case = _case(arguments, name)
        files = ModelFiles(case, arguments.work / case.name)
        dense = files.dense(arguments.rivals)
        in_torch = case.in_torch(onnx.load(str(dense[0].path))) if _torch(arguments) else None
        with_memory = arguments.loads > 0 and threads == arguments.threads[0]
        base = None
        if with_memory:
            for file in dense:
                row = memory_row(arguments, case, None, file, base)
                base = base or row
                yield row
        for pattern in arguments.patterns:
            ours = files.sparse(pattern, arguments.values, arguments.layouts)
            with torch.inference_mode():
                yield from time_forms(arguments, case, pattern, threads, [*dense, *ours], in_torch)
            if with_memory:
                for file in ours:
                    yield memory_row(arguments, case, pattern, file, base)


def _torch(arguments: argparse.Namespace) -> bool:
    return "torch" in arguments.rivals


def _case(arguments: argparse.Namespace, name: str) -> ModelCase:
    if name == "encoder":
        return encoder_case(tiny=arguments.tiny)
    if name == "decoder":
        return decoder_case(tiny=arguments.tiny)
    return smollm2_case(arguments.checkpoint, arguments.work / "smollm2-dense")


def time_forms(
    arguments: argparse.Namespace,
    case: ModelCase,
    pattern: str,
    threads: int,
    files: list[ModelFile],
    in_torch: Any,
) -> Iterator[dict[str, Any]]:
    """Opens every form of a model once, and compares them at each of the inputs."""
    sessions = {file.name: open_session(file.path, sparse=file.is_sparse) for file in files}
    expected = files[-1].pruned
    for name, inputs in case.inputs.items():
        if arguments.inputs and name not in arguments.inputs:
            continue
        print(f"{case.name} {threads=} {pattern} {name}", file=sys.stderr, flush=True)
        runs: dict[str, Any] = {}
        for file in files:
            runs[file.name] = bound_run(sessions[file.name], inputs.feeds)
        if in_torch is not None:
            runs["torch float32"] = lambda feeds=inputs.feeds: in_torch(feeds)
        rival = _deepsparse(arguments, case, pattern, inputs, threads)
        if rival is not None:
            runs["deepsparse"] = rival
        compared = compare(
            runs,
            BASELINE,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            settle=1,
            pause=PAUSE if threads > 1 else 0.0,
            clock="thread" if threads == 1 else "wall",
        )
        if rival is not None:
            rival.close()
        outputs = _outputs(expected, inputs) if expected else None
        known = {file.name: file for file in files}
        for candidate, timing in compared.timings.items():
            file = known.get(candidate)
            seconds = timing.wall.median
            yield {
                "model": case.name,
                "threads": threads,
                "inputs": name,
                "pattern": pattern,
                "candidate": candidate,
                "values": file.values if file else None,
                "layout": file.layout if file else None,
                "accuracy_level": file.accuracy_level if file else None,
                "milliseconds": seconds * 1e3,
                "cpu_milliseconds": timing.process.median * 1e3,
                "tokens_per_second": inputs.tokens / seconds,
                "speedup": timing.speedup.median,
                "speedup_quartiles": [timing.speedup.low, timing.speedup.high],
                "wall_speedup": timing.wall_speedup.median,
                "error": _error(sessions[candidate], inputs, outputs)
                if file and file.is_sparse and outputs is not None
                else None,
                "rounds": compared.rounds,
                "warnings": compared.noise.warnings,
            }


def _deepsparse(
    arguments: argparse.Namespace, case: ModelCase, pattern: str, inputs: Inputs, threads: int
) -> DeepSparse | None:
    if arguments.deepsparse_python is None or case.fixed is None:
        return None
    model = case.fixed(inputs)
    prune(model, pattern, case.min_weights)
    path = arguments.work / "deepsparse" / "model.onnx"
    # One file: the old onnx there does not expect the data beside it.
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(path))
    (x,) = inputs.feeds.values()
    return DeepSparse(arguments.deepsparse_python, path, x, threads)


def _outputs(pruned: Path, inputs: Inputs) -> np.ndarray:
    """The first output of the pruned model in dense form, which every sparse one should give."""
    result: np.ndarray = open_session(pruned).run(None, dict(inputs.feeds))[0]
    return result


def _error(session: Any, inputs: Inputs, expected: np.ndarray) -> float:
    result = session.run(None, dict(inputs.feeds))[0]
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def memory_row(
    arguments: argparse.Namespace,
    case: ModelCase,
    pattern: str | None,
    file: ModelFile,
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    """Opens a form in processes of its own, on one thread; medians of several count.

    Args:
        arguments: How many processes.
        case: The model.
        pattern: What is pruned; None for dense weights.
        file: The form.
        base: The row that ratios refer to; None: this one.
    """
    feeds = next(iter(case.inputs.values())).feeds
    libraries = [Path(custom_ops_path())] if file.is_sparse else []
    taken = [
        measure_residence(file.path, feeds, libraries=libraries) for _ in range(arguments.loads)
    ]
    figures = {
        field.name: statistics.median(getattr(residence, field.name) for residence in taken)
        for field in fields(Residence)
    }
    size = file_bytes(file.path)
    base = base or figures
    return {
        "model": case.name,
        "inputs": "memory",
        "pattern": pattern,
        "candidate": file.name,
        "values": file.values,
        "layout": file.layout,
        "file_bytes": size,
        **figures,
        "resident_ratio": figures["resident"] / base["resident"],
        "load_ratio": figures["load_seconds"] / base["load_seconds"],
        "peak_over_limit": figures["peak_load"] / (PEAK_FACTOR * size + PEAK_EXTRA),
        "warnings": [],
    }


if __name__ == "__main__":
    main()
