"""Perplexity, seconds and peak memory of every pruning method on one model.

Each cell, a method at a pattern, runs in a process of its own, so that one's memory is not
another's. All get the same calibration windows, but for presets, which get as many as they ask for.
Results are written after every cell, and cells that are there already, measured under the same
conditions, are not measured again: a run that was stopped goes on, and other methods and patterns
can be added later.

    python benchmarks/methods.py [MODEL] [--methods NAME ...] [--patterns 50% 60% 70% 2:4 4:8]
        [--samples 32] [--sequence-length 512] [--calibration FILE] [--evaluate NAME=FILE ...]
        [--max-tokens 4096] [--window 1024] [--threads N] [--json FILE] [--plot FILE] [--tiny]

`--tiny` tries it all on a random model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from zeroskip.runtime.machine import cpu_name

if TYPE_CHECKING:
    import torch

    from zeroskip.recipe import Recipe
    from zeroskip.recipe_document import CalibrationOptions

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
DATA = ROOT / "examples" / "data"
TEXT = Path(__file__).parent / "data" / "calibration.txt"
PATTERNS = ("50%", "60%", "70%", "2:4", "4:8")
P = "{pattern}"
# What each method is, as the passes of a recipe. Presets are known by their names.
METHODS: dict[str, list[Any]] = {
    "magnitude": [{"prune-magnitude": {"pattern": P}}, "apply-masks"],
    "wanda": ["observe", {"prune-wanda": {"pattern": P}}, "apply-masks"],
    "ria": ["observe", {"prune-ria": {"pattern": P}}, "apply-masks"],
    "ria permuted": [
        "observe",
        {"permute-channels": {"pattern": P}},
        {"prune-ria": {"pattern": P}},
        "apply-masks",
    ],
    "z": ["observe", {"prune-z": {"pattern": P}}, "apply-masks"],
    "cvr": ["observe", {"prune-cvr": {"pattern": P}}, "apply-masks"],
    "cvr + energy": ["observe", {"prune-cvr": {"pattern": P}}, "compensate-energy"],
    "wanda + energy": ["observe", {"prune-wanda": {"pattern": P}}, "compensate-energy"],
    "wanda + dsnot": ["observe", {"prune-wanda": {"pattern": P}}, "refine-dsnot", "apply-masks"],
    "wanda + owl": [
        {"allocate-sparsity": {"sparsity": P, "method": "owl"}},
        "observe",
        {"prune-wanda": {"pattern": P}},
        "apply-masks",
    ],
    "wanda + sensitivity": [
        {"allocate-sparsity": {"sparsity": P, "method": "sensitivity"}},
        "observe",
        {"prune-wanda": {"pattern": P}},
        "apply-masks",
    ],
    "sparsegpt": [{"observe": {"gram": True}}, {"prune-sparsegpt": {"pattern": P}}],
    "alps": [{"observe": {"gram": True}}, {"prune-alps": {"pattern": P}}],
    "sparsegpt + blocks": [
        {"observe": {"gram": True}},
        {"prune-sparsegpt": {"pattern": P}},
        "reconstruct-blocks",
    ],
    "sparsegpt + outputs": [
        {"observe": {"gram": True}},
        {"prune-sparsegpt": {"pattern": P}},
        {
            "distill-outputs": {
                "epochs": 2,
                "learning_rate": 0.001,
                "batch": 1,
                "held_out": 0.03,
            }
        },
    ],
}
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; `--worker` is how the script calls itself."""
    from zeroskip.presets import PRESETS

    known = ["dense", *METHODS, *PRESETS]
    parser = argparse.ArgumentParser(description="Measure the pruning methods.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--calibration", type=Path, default=TEXT)
    parser.add_argument(
        "--evaluate",
        nargs="+",
        default=[f"sotu={DATA / 'evaluation.txt'}", f"moby-dick={DATA / 'moby_dick.txt'}"],
        help="texts, each NAME=FILE",
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each evaluation text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, default=Path("methods.json"))
    parser.add_argument("--plot", type=Path, help="density against perplexity, as PNG")
    parser.add_argument("--tiny", action="store_true", help="a random model, to try the script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures each cell in a fresh process, prints tables, writes JSON."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    conditions = describe(arguments)
    rows = known_rows(arguments.json, conditions)
    for method in arguments.methods:
        for pattern in [""] if method == "dense" else arguments.patterns:
            if any((row["method"], row["pattern"]) == (method, pattern) for row in rows):
                continue
            rows.append(in_a_process(arguments, method, pattern))
            document = {"conditions": conditions, "results": rows}
            text = json.dumps(document, indent=2) + "\n"
            arguments.json.write_text(text, encoding="utf-8")
            print(f"{method} {pattern}: {summary(rows[-1])}", file=sys.stderr, flush=True)
    print(json.dumps(conditions, indent=2))
    print_tables(rows, arguments.patterns)
    if arguments.plot:
        from plots import plot_perplexities

        drawn = plot_perplexities(rows, arguments.plot)
        print(f"drawn in {arguments.plot}" if drawn else "matplotlib is not installed: no plot")
    print(f"written to {arguments.json}")


def in_a_process(arguments: argparse.Namespace, method: str, pattern: str) -> Row:
    """Measures one cell in a process of its own."""
    command = [sys.executable, __file__, str(arguments.model), "--worker", "--methods", method]
    command += ["--patterns", pattern, "--samples", str(arguments.samples)]
    command += ["--sequence-length", str(arguments.sequence_length)]
    command += ["--calibration", str(arguments.calibration), "--evaluate", *arguments.evaluate]
    command += ["--max-tokens", str(arguments.max_tokens), "--window", str(arguments.window)]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    command += ["--tiny"] if arguments.tiny else []
    # Threads that wait for each other in a loop would count as work, and on a busy machine as most.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        return {"method": method, "pattern": pattern, "note": f"ended with code {done.returncode}"}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(arguments: argparse.Namespace) -> Row:
    """Prunes once and evaluates; runs in a process of its own."""
    import torch

    from zeroskip import compile_sparse, perplexity
    from zeroskip.ir.errors import PatternError
    from zeroskip.presets import PRESETS
    from zeroskip.recipe_document import CalibrationOptions

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (method,), (pattern,) = arguments.methods, arguments.patterns
    row: Row = {"method": method, "pattern": pattern}
    recipe = recipe_of(method, pattern)
    if isinstance(recipe, str):
        return {**row, "note": recipe}
    options = CalibrationOptions(arguments.samples, arguments.sequence_length)
    if method in PRESETS and recipe is not None:
        options = recipe.calibration
    started = time.perf_counter(), time.process_time()
    model, calibration, texts = case(arguments, options)
    row["calibration"] = f"{options.samples} x {options.sequence_length}"
    if options.generated:
        row["calibration"] += f" + {options.generated} generated"
        # Loading is in it too, which takes next to nothing.
        row["generating_seconds"] = time.perf_counter() - started[0]
        row["generating_cpu_seconds"] = time.process_time() - started[1]
    loaded = peak_bytes()
    if recipe is not None:
        started = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compiled = compile_sparse(model, recipe.passes, calibration=calibration)
            except PatternError as error:
                return {**row, "note": error.problem}
        row["seconds"] = time.perf_counter() - started[0]
        row["cpu_seconds"] = time.process_time() - started[1]
        row["load_average"] = os.getloadavg()[0]
        row["each_pass_seconds"] = {p.name: p.seconds for p in compiled.report.passes}
        row["density"] = compiled.report.density
        del compiled
    row |= {"loaded_mib": loaded / 2**20, "peak_mib": peak_bytes() / 2**20}
    row["negative_log_likelihood"] = {
        name: perplexity(model, ids, sequence_length=arguments.window).negative_log_likelihood
        for name, ids in texts.items()
    }
    return row


def case(
    arguments: argparse.Namespace, options: CalibrationOptions
) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A model, calibration windows, and the evaluation texts as tokens."""
    import torch

    if arguments.tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64}
        config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
        tokens = torch.randint(96, (6, 1, 24))
        batches = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens]
        return LlamaForCausalLM(config).eval(), batches, {"random": torch.randint(96, (64,))}
    from zeroskip.calibration import calibration_for
    from zeroskip.evaluate import encode
    from zeroskip.models import load_model

    model, tokenizer = load_model(arguments.model)
    batches = calibration_for(options, arguments.calibration, tokenizer, lambda: model)
    texts = {}
    for entry in arguments.evaluate:
        name, _, path = entry.partition("=")
        texts[name] = encode(Path(path), tokenizer, arguments.max_tokens)
    return model, batches, texts


def recipe_of(method: str, pattern: str) -> Recipe | str | None:
    """The recipe of a method at a pattern, or why there is none; None for the dense model."""
    from zeroskip.passes import PASSES
    from zeroskip.presets import PRESETS, preset
    from zeroskip.recipe import parse_recipe

    if method == "dense":
        return None
    if method in PRESETS:
        return preset(method, pattern)
    text = json.dumps(METHODS[method])
    names = [
        name for entry in METHODS[method] for name in ([entry] if isinstance(entry, str) else entry)
    ]
    missing = [name for name in names if name not in PASSES]
    if missing:
        return f"there is no pass {missing[0]}"
    if ":" in pattern and "allocate-sparsity" in names:
        return "N:M has one budget for all linears"
    if ":" not in pattern and "permute-channels" in names:
        return "permuting is for N:M"
    return parse_recipe({"passes": json.loads(text.replace(P, pattern))}, where=method)


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def known_rows(path: Path, conditions: dict[str, Any]) -> list[Row]:
    """Cells that were measured before under the same conditions."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["conditions"] != conditions:
        sys.exit(f"{path} was measured under other conditions: name another file with --json")
    return [row for row in document["results"] if "note" not in row]


def summary(row: Row) -> str:
    """One line for a cell."""
    if "note" in row:
        return str(row["note"])
    found = (f"{t} {math.exp(v):.2f}" for t, v in row["negative_log_likelihood"].items())
    return ", ".join(found) + (f" in {row['seconds']:.0f} s" if "seconds" in row else "")


def print_tables(rows: Sequence[Row], patterns: Sequence[str]) -> None:
    """Perplexities, a table for each text; then seconds, and peak memory."""
    console = Console(width=120, highlight=False)
    cells = {(row["method"], row["pattern"]): row for row in rows if "note" not in row}
    texts = next(iter(cells.values()))["negative_log_likelihood"] if cells else {}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    dense = cells.get(("dense", ""))

    def show(title: str, value: Any) -> None:
        console.print(title)
        table = Table("method", *patterns)
        for method in methods:
            found = (cells.get((method, pattern)) for pattern in patterns)
            table.add_row(method, *("" if row is None else value(row) for row in found))
        console.print(table)

    for text in texts:
        floor = f", dense {math.exp(dense['negative_log_likelihood'][text]):.2f}" if dense else ""
        show(
            f"perplexity on {text}{floor}",
            lambda row, text=text: f"{math.exp(row['negative_log_likelihood'][text]):.2f}",
        )
    show("seconds", lambda row: f"{row['seconds']:.0f}")
    show("peak MiB of the process", lambda row: f"{row['peak_mib']:.0f}")


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """All it takes to measure the same again."""
    return {
        "model": "tiny" if arguments.tiny else arguments.model.name,
        "calibration": arguments.calibration.name,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "evaluate": [entry.partition("=")[0] for entry in arguments.evaluate],
        "max_tokens": arguments.max_tokens,
        "window": arguments.window,
        "threads": arguments.threads,
        "cores": len(os.sched_getaffinity(0)),
        "processor": cpu_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


if __name__ == "__main__":
    main()
