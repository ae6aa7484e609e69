"""What scales, learned scales and shifted biases are worth before and after pruning one model.

Perplexity of a pruned model, for each pruner and pattern: alone, after scales from statistics, after
Sparsity Induction as published, after ours, and with biases that make up for what is lost. Also how
much faster scores are refreshed from a cached diagonal than from a new calibration pass.

    python benchmarks/induction.py [MODEL] [--patterns 50% 2:4] [--pruners prune-magnitude prune-wanda
        prune-ria prune-sparsegpt] [--methods NAME ...] [--evaluate NAME=FILE ...] [--samples 8] [--sequence-length 256]
        [--repeats 1] [--json FILE] [--tiny]

A method that has no meaning for a pruner is left out, and said so. Results are written after every
cell. Pruners that update weights turn a rounding error into another choice of weights a few layers
on: with `--repeats N` each cell is measured on N models whose weights differ by one part in ten
million, the same N for all. `--tiny` tries it all on a random model in a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zeroskip import calibration_from_text, perplexity
from zeroskip.ir.capture import capture
from zeroskip.ir.induction import Induced
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.score_refresh import refreshed_scores
from zeroskip.ir.selection import select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.models import load_model
from zeroskip.passes import PASSES, Pass, PassManager, PatternPass, UpdatingPruner
from zeroskip.runtime.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
DATA = ROOT / "examples" / "data"
PRUNERS = ("prune-magnitude", "prune-wanda", "prune-ria", "prune-sparsegpt")
# What comes before the pruner, and what between it and apply-masks.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alone": ((), ()),
    "+ FoldScales": (("fold-scales",), ()),
    "+ InduceSparsity literal": (("induce-sparsity literal",), ()),
    "+ InduceSparsity": (("induce-sparsity",), ()),
    "+ ShiftToBias": ((), ("shift-to-bias",)),
    "+ ShiftToBias updated": ((), ("shift-to-bias updated",)),
    "+ InduceSparsity + ShiftToBias": (("induce-sparsity",), ("shift-to-bias",)),
}
# What has a guard: with a pruner that is better than magnitude, it must make nothing worse. That of
# ShiftToBias is off in "updated", which says what the guard is worth.
GUARDED = ("+ InduceSparsity", "+ ShiftToBias", "+ InduceSparsity + ShiftToBias")
SCORES = {"prune-magnitude": "magnitude", "prune-wanda": "wanda", "prune-sparsegpt": "sparsegpt"}
# Between the models of `--repeats`, relative; half the distance of two float32 numbers is up to 6e-8.
NOISE = 1e-7
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure what inducing sparsity is worth.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=list(PRUNERS[:2]))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--evaluate",
        nargs="+",
        default=[
            f"sotu={DATA / 'evaluation.txt'}",
            f"moby-dick={DATA / 'moby_dick.txt'}",
        ],
        help="texts, each NAME=FILE",
    )
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--samples", type=int, default=8, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in each of them")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="models that differ by rounding")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each evaluation text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, default=Path("induction.json"))
    parser.add_argument("--tiny", action="store_true", help="a random model, to try the script")
    return parser.parse_args()


def main() -> None:
    """Measures every cell, prints the tables, writes JSON."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    program, texts = tiny_case(arguments) if arguments.tiny else real_case(arguments)
    started = time.perf_counter()
    program = PassManager([PASSES["find-scale-groups"]()])(program).program
    conditions = describe(arguments, time.perf_counter() - started)
    refresh = time_refresh(program)
    dense = {
        name: perplexity(
            Running(program), ids, sequence_length=arguments.window
        ).negative_log_likelihood
        for name, ids in texts.items()
    }
    document: dict[str, Any] = {"conditions": conditions, "refresh": refresh, "dense": dense}
    rows: list[Row] = []
    for pruner in arguments.pruners:
        for pattern in arguments.patterns:
            for method in arguments.methods:
                rows.append(measure_all(program, texts, pruner, pattern, method, arguments))
                document["results"] = rows
                text = json.dumps(document, indent=2) + "\n"
                arguments.json.write_text(text, encoding="utf-8")
                print(f"{pruner} {pattern} {method}: {summary(rows[-1])}", file=sys.stderr)
    document["goals"] = goals(rows, dense)
    arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(conditions, indent=2))
    print_tables(rows, dense)
    print(
        f"scores refreshed from a cached diagonal: {refresh['cached_seconds']:.3f} s, from a new "
        f"calibration pass: {refresh['fresh_seconds']:.1f} s, {refresh['ratio']:.0f} times"
    )
    for goal in document["goals"]:
        print(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['name']}: {goal['value']}")
    print(f"written to {arguments.json}")


def real_case(arguments: argparse.Namespace) -> tuple[Program, dict[str, torch.Tensor]]:
    """A checkpoint, calibration windows, and the evaluation texts as tokens."""
    model, tokenizer = load_model(arguments.model)
    calibration = calibration_from_text(
        arguments.calibration,
        tokenizer,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
    )
    texts = {}
    for entry in arguments.evaluate:
        name, _, path = entry.partition("=")
        text = Path(path).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids[: arguments.max_tokens + 1])
    return captured(model, calibration), texts


def tiny_case(arguments: argparse.Namespace) -> tuple[Program, dict[str, torch.Tensor]]:
    """A random model of two layers, and random tokens."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=112,
        vocab_size=160,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    calibration = [
        {"input_ids": torch.randint(0, 160, (1, 24)), "attention_mask": torch.ones(1, 24).long()}
        for _ in range(4)
    ]
    arguments.window = 32
    return captured(model, calibration), {"random": torch.randint(0, 160, (129,))}


def captured(model: torch.nn.Module, calibration: Sequence[Batch]) -> Program:
    """The model as a Program with calibration data."""
    example = {
        name: torch.cat([batch[name][:, :16] for batch in calibration[:2]])
        for name in calibration[0]
    }
    return dataclasses.replace(capture(model, example), calibration=tuple(calibration))


class Running:
    """A program that can be evaluated."""

    def __init__(self, program: Program) -> None:
        self._program = program.loaded()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns logits [B, S, V] of tokens [B, S]."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self._program.run({name: inputs[name] for name in self._program.inputs})["logits"]


def measure_all(
    program: Program,
    texts: dict[str, torch.Tensor],
    pruner: str,
    pattern: str,
    method: str,
    arguments: argparse.Namespace,
) -> Row:
    """Prunes every model of `--repeats`; returns the means, and what each gave."""
    row: Row = {}
    draws = []
    for repeat in range(arguments.repeats):
        shaken = shake(program, repeat) if repeat else program
        row = measure(shaken, texts, pruner, pattern, method, arguments)
        if "note" in row:
            return row
        draws.append({key: row[key] for key in ("negative_log_likelihood", "seconds")})
    row["seconds"] = statistics.fmean(draw["seconds"] for draw in draws)
    found = {text: [draw["negative_log_likelihood"][text] for draw in draws] for text in texts}
    row["negative_log_likelihood"] = {text: statistics.fmean(found[text]) for text in texts}
    row["draws"] = found
    return row


def shake(program: Program, seed: int) -> Program:
    """Returns the program with weights that differ by rounding."""
    generator = torch.Generator().manual_seed(seed)
    shaken = {}
    for linear in select_linears(program):
        weight = program.weights[linear.parameter]
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        shaken[linear.parameter] = weight * (1 + NOISE * noise).to(weight.dtype)
    return program.with_weights(shaken)


def measure(
    program: Program,
    texts: dict[str, torch.Tensor],
    pruner: str,
    pattern: str,
    method: str,
    arguments: argparse.Namespace,
) -> Row:
    """Prunes once; returns the perplexities, or a note on why there are none."""
    row: Row = {"pruner": pruner, "pattern": pattern, "method": method}
    before, after = METHODS[method]
    reason = why_left_out(pruner, method)
    if reason is not None:
        return {**row, "note": reason}
    kind = PASSES[pruner]
    assert issubclass(kind, PatternPass)
    observe: Any = PASSES["observe"]
    gram = issubclass(kind, UpdatingPruner)
    steps = [
        observe(gram=gram),
        *(make(name, pruner, pattern, arguments.epochs) for name in before),
        kind(pattern),
        *(make(name, pruner, pattern, arguments.epochs) for name in after),
        PASSES["apply-masks"](),
    ]
    if "literal" in method:  # Its shifts leave no statistics of what they moved.
        steps.insert(2, observe(gram=gram))
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That folding does nothing for Wanda is what we show.
        result = PassManager(steps)(program)
    row["seconds"] = time.perf_counter() - started
    row["each_pass_seconds"] = {record.name: record.seconds for record in result.records}
    row["negative_log_likelihood"] = {
        name: perplexity(
            Running(result.program), ids, sequence_length=arguments.window
        ).negative_log_likelihood
        for name, ids in texts.items()
    }
    induced = result.program.facts.get(Induced)
    if isinstance(induced, Induced):
        kept = {outcome.linears: outcome.kept for outcome in induced.outcomes.values()}
        row["groups_kept"] = [sum(kept.values()), len(kept)]
    return row


def why_left_out(pruner: str, method: str) -> str | None:
    """Returns why a pruner and a method do not go together, or None when they do."""
    before, after = METHODS[method]
    for name in (pruner, *before, *after):
        if name.split()[0] not in PASSES:
            return f"there is no pass {name.split()[0]}"
    if "updated" in method and not issubclass(PASSES[pruner], UpdatingPruner):
        return f"{pruner} changes no weight that stays"
    if "induce-sparsity" in before and pruner not in SCORES:
        return f"scales are learned for the scores of {', '.join(SCORES.values())} only"
    return None


def make(name: str, pruner: str, pattern: str, epochs: int) -> Pass:
    """A pass of a method, with the options that fit the pruner and the pattern."""
    kind: Any = PASSES[name.split()[0]]
    if name.startswith("induce-sparsity"):
        literal = "literal" in name
        # The paper has no guard.
        options = {"literal": literal, "guard": not literal, "epochs": epochs}
        # As published, scales follow norms and no score: any pruner may come next.
        score = SCORES.get(pruner, "magnitude")
        if literal and score == "sparsegpt":
            score = "magnitude"
        return kind(pattern=pattern, score=score, **options)  # type: ignore[no-any-return]
    if name.startswith("shift-to-bias"):
        return kind(add=True, updated="updated" in name)  # type: ignore[no-any-return]
    return kind()  # type: ignore[no-any-return]


def time_refresh(program: Program) -> dict[str, float]:
    """Seconds to refresh Wanda's scores of all linears, from cached diagonals and from new data."""
    started = time.perf_counter()
    observed = PassManager([PASSES["observe"]()])(program).program
    calibrated = time.perf_counter() - started
    edges = observed.fact(Statistics).edges
    names = {linear.name for linear in select_linears(program)}
    linears = [linear for linear in find_linears(program) if linear.name in names]
    weights = {linear.name: linear.weight(program).float() for linear in linears}
    diagonals = {name: edges[name].root_mean_square().square() for name in names}
    factors = {name: torch.rand(len(diagonal)) + 0.5 for name, diagonal in diagonals.items()}
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for name in names:
            refreshed_scores(weights[name], diagonals[name], factors[name])
        times.append(time.perf_counter() - started)
    cached = sorted(times)[2]
    # After a new pass the scores have to be computed as well.
    fresh = calibrated + cached
    return {"cached_seconds": cached, "fresh_seconds": fresh, "ratio": fresh / cached}


def goals(rows: Sequence[Row], dense: dict[str, float]) -> list[Row]:
    """What was to be reached, and whether it was."""
    found = []
    cells = {(r["pruner"], r["pattern"], r["method"]): r for r in rows if "note" not in r}
    for (pruner, pattern, method), row in cells.items():
        alone = cells.get((pruner, pattern, "alone"))
        promised = (
            method in GUARDED if pruner != "prune-magnitude" else method == "+ InduceSparsity"
        )
        if alone is None or not promised:
            continue
        for text, floor in dense.items():
            without = alone["negative_log_likelihood"][text] - floor
            gap = row["negative_log_likelihood"][text] - floor
            limit = 0.5 if pruner == "prune-magnitude" else 1.0
            doubt = 2 * error_of_mean(
                [
                    a - limit * b
                    for a, b in zip(row["draws"][text], alone["draws"][text], strict=True)
                ]
            )
            found.append(
                {
                    "name": f"{pruner} {pattern} {method} on {text}: log-perplexity above dense, "
                    f"at most {limit:g} of {without:.3f}",
                    "value": f"{gap:.3f}" + (f" +- {doubt:.3f}" if doubt else ""),
                    "met": gap <= limit * without + max(doubt, 1e-4),
                }
            )
    return found


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 of a single value, of which nothing is known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summary(row: Row) -> str:
    """One line for a cell."""
    if "note" in row:
        return str(row["note"])
    found = (f"{t} {math.exp(v):.2f}" for t, v in row["negative_log_likelihood"].items())
    return f"{', '.join(found)} in {row['seconds']:.0f} s"


def print_tables(rows: Sequence[Row], dense: dict[str, float]) -> None:
    """Perplexities, a table for each pruner."""
    console = Console(width=120, highlight=False)
    shown = ", ".join(f"{name} {math.exp(value):.3f}" for name, value in dense.items())
    console.print(f"dense: {shown}")
    for pruner in dict.fromkeys(row["pruner"] for row in rows):
        patterns = list(dict.fromkeys(row["pattern"] for row in rows))
        heads = [f"{pattern} {text}" for pattern in patterns for text in dense]
        table = Table("method", *heads, title=f"{pruner}: perplexity", title_justify="left")
        for method in dict.fromkeys(row["method"] for row in rows):
            cells, note = [], ""
            for pattern in patterns:
                key = (pruner, pattern, method)
                row = next(r for r in rows if (r["pruner"], r["pattern"], r["method"]) == key)
                note = row.get("note", note)
                values = row.get("negative_log_likelihood", {})
                cells += [f"{math.exp(values[t]):.3f}" if t in values else "-" for t in dense]
            table.add_row(f"{method} ({note})" if note else method, *cells)
        console.print(table)


def describe(arguments: argparse.Namespace, find_seconds: float) -> dict[str, Any]:
    """All it takes to measure the same again."""
    return {
        "model": "tiny" if arguments.tiny else arguments.model.name,
        "calibration": arguments.calibration.name,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "epochs": arguments.epochs,
        "repeats": arguments.repeats,
        "evaluate": [entry.partition("=")[0] for entry in arguments.evaluate],
        "max_tokens": arguments.max_tokens,
        "window": arguments.window,
        "find_scale_groups_seconds": find_seconds,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "processor": cpu_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


if __name__ == "__main__":
    main()
