"""Seconds from one sparsity to another: an elastic model against pruning again with Wanda.

    python benchmarks/elastic_switching.py [MODEL] [--sparsities 0.3 0.5 0.7] [--rounds 3]
        [--samples 16] [--sequence-length 512] [--threads N] [--json FILE] [--tiny]

Before and after each pruning, the elastic model goes to that sparsity, `--rounds` times in all; of
these the median counts. What adapters hold does not matter to the time, so they are trained for one
epoch on a few tokens, with all groups of the paper. Both sides start from a model in memory and end
with a sparse program that is verified and whose distance from the dense one is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from elastic import GROUPS
from methods import MODEL, TEXT, case, describe, recipe_of

from zeroskip.recipe_document import CalibrationOptions

TRAINING = (1, 64)  # windows and tokens of each
GOAL = 50.0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure how fast elastic sparsity changes.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument(
        "--rounds", type=int, default=3, help="changes of sparsity for each pruning"
    )
    parser.add_argument("--samples", type=int, default=16, help="windows that Wanda sees")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--calibration", type=Path, default=TEXT)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, default=Path("elastic_switching.json"))
    parser.add_argument("--tiny", action="store_true", help="a random model, to try the script")
    arguments = parser.parse_args()
    # No text is scored here; `methods.case` and `methods.describe` ask for some.
    arguments.evaluate, arguments.max_tokens, arguments.window = [], 0, 0
    return arguments


def main() -> None:
    """Trains a little, then changes sparsity and prunes in turn; prints a table and writes JSON."""
    arguments = parse_arguments()
    import torch

    from zeroskip import compile_sparse
    from zeroskip.passes import TrainElastic

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, calibration, _ = case(arguments, CalibrationOptions(*TRAINING))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That a batch of a few tokens is little data is intended.
        training = [TrainElastic(groups=GROUPS, epochs=1)]
        elastic = compile_sparse(model, training, calibration=calibration)
    options = CalibrationOptions(arguments.samples, arguments.sequence_length)
    # What is done once, a change after the first has behind it.
    elastic.at(arguments.sparsities[0])
    rows: list[dict[str, Any]] = []
    for sparsity in arguments.sparsities:
        half = arguments.rounds // 2
        changes = [timed(elastic.at, sparsity) for _ in range(arguments.rounds - half)]
        model, calibration, _ = case(arguments, options)
        recipe: Any = recipe_of("wanda", str(sparsity))
        pruning = timed(compile_sparse, model, recipe.passes, calibration=calibration)
        changes += [timed(elastic.at, sparsity) for _ in range(half)]
        switch = statistics.median(changes)
        rows.append(
            {
                "sparsity": sparsity,
                "switch_seconds": changes,
                "prune_seconds": pruning,
                "ratio": pruning / switch,
            }
        )
        document = {"conditions": describe(arguments), "goal": GOAL, "results": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(f"{sparsity:g}: {switch:.2f} s, {pruning:.1f} s again", file=sys.stderr, flush=True)
    print("| sparsity | elastic, s | Wanda again, s | ratio | goal |\n|---|---|---|---|---|")
    for row in rows:
        switch, met = statistics.median(row["switch_seconds"]), row["ratio"] >= GOAL
        print(
            f"| {row['sparsity']:g} | {switch:.2f} | {row['prune_seconds']:.1f} "
            f"| {row['ratio']:.1f} | {'met' if met else 'MISSED'} ({GOAL:g}) |"
        )


def timed(function: Any, *values: Any, **named: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*values, **named)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
