"""One elastic artefact against pruning again at every sparsity: perplexity and time.

    python benchmarks/elastic.py [MODEL] [--sparsities 0.3 0.4 0.5 0.6 0.7] [--groups ...] [--epochs 10]
        [--samples 16] [--sequence-length 512] [--ablate] [--json FILE] [--plot FILE] [--tiny]

`--ablate` also trains the other hierarchies and mixers, and evaluates them at the highest sparsity.
Results are written after every step; those that are there already, measured under the same
conditions, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from methods import DATA, MODEL, TEXT, case, describe
from plots import plot_elastic

from zeroskip.recipe_document import CalibrationOptions

Row = dict[str, Any]
GROUPS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
# Hierarchy and mixer; the first is the default.
VARIANTS = (
    ("nested", "mixed"),
    ("independent", "mixed"),
    ("shared", "mixed"),
    ("nested", "drawn"),
    ("nested", "dense"),
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure elastic sparsity.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--groups", nargs="+", type=float, default=list(GROUPS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--loss", default="token")
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--calibration", type=Path, default=TEXT)
    parser.add_argument(
        "--evaluate",
        nargs="+",
        default=[f"sotu={DATA / 'evaluation.txt'}", f"moby-dick={DATA / 'moby_dick.txt'}"],
    )
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--rivals", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--json", type=Path, default=Path("elastic.json"))
    parser.add_argument("--plot", type=Path, help="sparsity against perplexity, as PNG")
    parser.add_argument("--tiny", action="store_true", help="a random model, to try the script")
    return parser.parse_args()


def main() -> None:
    """Trains once, materialises each sparsity, prunes again with the rivals, and prints a table."""
    arguments = parse_arguments()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = ("groups", "epochs", "learning_rate", "loss")
    conditions = {**describe(arguments), **{key: getattr(arguments, key) for key in chosen}}
    rows = known_rows(arguments.json, conditions)

    def keep(row: Row) -> None:
        rows.append(row)
        text = json.dumps({"conditions": conditions, "results": rows}, indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
        found = (f"{t} {math.exp(v):.2f}" for t, v in row.get("log_perplexity", {}).items())
        print(f"{row['method']} {row['sparsity']}: {', '.join(found)}", file=sys.stderr, flush=True)

    for variant in VARIANTS[: None if arguments.ablate else 1]:
        is_default = variant == VARIANTS[0]
        wanted = arguments.sparsities if is_default else [max(arguments.sparsities)]
        measure_elastic(arguments, variant, wanted, rows, keep)
    for rival in arguments.rivals:
        for sparsity in arguments.sparsities:
            if not any((r["method"], r["sparsity"]) == (rival, sparsity) for r in rows):
                measure_rival(arguments, rival, sparsity, keep)
    print_table(rows, arguments.sparsities)
    if arguments.plot:
        drawn = plot_elastic(rows, arguments.plot)
        print(f"drawn in {arguments.plot}" if drawn else "matplotlib is not installed: no plot")


def measure_elastic(
    arguments: argparse.Namespace,
    variant: tuple[str, str],
    sparsities: list[float],
    rows: list[Row],
    keep: Any,
) -> None:
    """Trains one variant and evaluates what it gives at each sparsity."""
    from zeroskip import compile_sparse
    from zeroskip.passes import MaterializeElastic, PassManager, TrainElastic

    method = "elastic" if variant == VARIANTS[0] else f"elastic {variant[0]} {variant[1]}"
    missing = [
        s for s in sparsities if not any((r["method"], r["sparsity"]) == (method, s) for r in rows)
    ]
    if not missing:
        return
    model, calibration, texts = case(arguments, calibration_of(arguments))
    step = TrainElastic(
        groups=tuple(arguments.groups),
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        loss=arguments.loss,
        hierarchy=variant[0],  # type: ignore[arg-type]
        mixer=variant[1],
    )
    started = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = compile_sparse(model, [step], calibration=calibration)
    trained = {
        "train_seconds": time.perf_counter() - started[0],
        "train_cpu_seconds": time.process_time() - started[1],
        "load_average": os.getloadavg()[0],
    }
    for sparsity in missing:
        begun = time.perf_counter()
        made = PassManager([MaterializeElastic(sparsity)])(compiled.program).program
        run = type(compiled)(None, made, compiled.report)
        seconds = time.perf_counter() - begun
        keep(
            {
                "method": method,
                "sparsity": sparsity,
                "switch_seconds": seconds,
                "log_perplexity": evaluate(run, texts, arguments.window),
                **trained,
            }
        )


def measure_rival(arguments: argparse.Namespace, rival: str, sparsity: float, keep: Any) -> None:
    """Prunes the dense model again and evaluates it."""
    from methods import recipe_of

    from zeroskip import compile_sparse

    model, calibration, texts = case(arguments, calibration_of(arguments))
    recipe: Any = recipe_of(rival, str(sparsity))
    started = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = compile_sparse(model, recipe.passes, calibration=calibration)
    keep(
        {
            "method": rival,
            "sparsity": sparsity,
            "switch_seconds": time.perf_counter() - started[0],
            "cpu_seconds": time.process_time() - started[1],
            "log_perplexity": evaluate(compiled, texts, arguments.window),
        }
    )


def calibration_of(arguments: argparse.Namespace) -> CalibrationOptions:
    """What training and the rivals see."""
    return CalibrationOptions(arguments.samples, arguments.sequence_length)


def evaluate(target: Any, texts: dict[str, Any], window: int) -> dict[str, float]:
    """Returns the negative log likelihood of each text, for each token."""
    from zeroskip import perplexity

    return {
        name: perplexity(target, ids, sequence_length=window).negative_log_likelihood
        for name, ids in texts.items()
    }


def known_rows(path: Path, conditions: dict[str, Any]) -> list[Row]:
    """What was measured before under the same conditions."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["conditions"] != json.loads(json.dumps(conditions)):
        sys.exit(f"{path} was measured under other conditions: name another file with --json")
    rows: list[Row] = document["results"]
    return rows


def print_table(rows: list[Row], sparsities: list[float]) -> None:
    """Perplexity at each sparsity for each text, and the seconds to get there."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    texts = list(rows[0]["log_perplexity"]) if rows else []
    for text in texts:
        print(f"\n| {text} | " + " | ".join(f"{s:g}" for s in sparsities) + " |")
        print("|---" * (len(sparsities) + 1) + "|")
        for method in methods:
            found = {r["sparsity"]: r for r in rows if r["method"] == method}
            cells = (
                f"{math.exp(found[s]['log_perplexity'][text]):.2f}" if s in found else ""
                for s in sparsities
            )
            print(f"| {method} | " + " | ".join(cells) + " |")
    print("\n| seconds to switch | " + " | ".join(f"{s:g}" for s in sparsities) + " |")
    print("|---" * (len(sparsities) + 1) + "|")
    for method in methods:
        found = {r["sparsity"]: r for r in rows if r["method"] == method}
        cells = (f"{found[s]['switch_seconds']:.1f}" if s in found else "" for s in sparsities)
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
