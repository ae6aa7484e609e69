"""The command `zeroskip`.

Exit codes: 0 done; 2 the command line or an input file cannot be used, and nothing was computed;
1 a compilation or an evaluation stopped. Problems go to stderr: what is wrong, where, in which
pass, and the next step to take; results go to stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.elastic_commands import curve_command, materialize_command
from zeroskip.exits import EXIT_CODES, REFUSED, STOPPED, fail, refusing_inputs
from zeroskip.ir.errors import CompileError

if TYPE_CHECKING:
    from zeroskip.recipe import Recipe

# Everything that imports torch is imported inside the commands: `zeroskip --help` is instant.

app = typer.Typer(
    name="zeroskip",
    help="A compiler for post-training sparsity.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Text = Annotated[Path, typer.Option("--text", help="The text to score: a UTF-8 file.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; always ends in SystemExit."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except CompileError as error:
        fail(error, STOPPED)


@app.command("compile", epilog=EXIT_CODES)
def compile_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory or a GGUF file.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A YAML or JSON file, or fast, balanced, best.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is not there yet.")],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Text to calibrate on: UTF-8.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="What fast, balanced or best prune to: 50%, 2:4 ...")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of text.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens in each.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Chooses the windows.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget, such as 4GiB.")] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Write the program before and after each pass here.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no report.")] = False,
) -> None:
    """Compile MODEL by a recipe into a folder.

    OUT appears only when everything succeeded. It holds checkpoint/ (an ordinary Hugging Face
    directory), recipe.yaml (what ran, every option spelled out), report.json, and what the export
    passes wrote: their relative directories lie under OUT. After a recipe that ends in train-elastic it
    holds elastic.json and elastic.safetensors too, for `zeroskip materialize`. --samples, --sequence-length, --seed and
    --memory override the recipe.
    """
    with ExitStack() as stack:
        with refusing_inputs():
            from zeroskip.ir.folders import new_folder
            from zeroskip.models import load_tokenizer
            from zeroskip.progress import without_loading_bars
            from zeroskip.recipe import dump_recipe, find_recipe
            from zeroskip.relocation import relocated, under

            stack.enter_context(without_loading_bars(quiet or as_json))
            plan = _overridden(find_recipe(recipe, pattern), samples, sequence_length, seed, memory)
            tokenizer = load_tokenizer(model)
            batches = _calibration(calibration, tokenizer, plan) if calibration else None
            source = _source(model)
            folder = stack.enter_context(new_folder(out))
        from zeroskip.compile import compile_sparse
        from zeroskip.elastic import write_if_elastic
        from zeroskip.passes import DumpPrograms

        compiled = compile_sparse(
            source,
            [under(step, folder) for step in plan.passes],
            calibration=batches,
            memory=plan.memory,
            instruments=[DumpPrograms(dump)] if dump else [],
            progress=not (quiet or as_json),
        )
        compiled.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        write_if_elastic(compiled, folder)
        (folder / "recipe.yaml").write_text(dump_recipe(plan, defaults=True), encoding="utf-8")
        report = relocated(compiled.report.to_json(), folder, out.absolute())
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        shown = relocated(str(compiled.report), folder, out)
    if as_json:
        typer.echo(text)
    elif not quiet:
        typer.echo(f"{shown}\n{out}")


@app.command("export", epilog=EXIT_CODES)
def export_command(
    source: Annotated[
        Path, typer.Argument(help="A folder with model.onnx, a Hugging Face directory, or a GGUF.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is not there yet.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Unpack the weights: for runtimes without the kernels.")
    ] = False,
) -> None:
    """Write SOURCE as an ONNX folder.

    A checkpoint is exported as it is. Of an ONNX folder with packed weights, --dense writes the
    plain form: standard operators and dense weights, zeros included.
    """
    from zeroskip.export import MODEL_FILE, export_checkpoint, export_dense

    if (source / MODEL_FILE).is_file():
        if not dense:
            problem = CompileError(
                "this is an ONNX folder already", where=str(source), next_step="add --dense"
            )
            fail(problem, REFUSED)
        count = export_dense(source, out)
        typer.echo(f"{count} packed linears are dense in {out}")
        return
    with refusing_inputs():
        from zeroskip.ir.folders import check_target

        check_target(out)
    export_checkpoint(source, out)
    typer.echo(str(out))


@app.command("eval", epilog=EXIT_CODES)
def eval_command(
    target: Annotated[
        Path, typer.Argument(help="A folder with model.onnx, a Hugging Face directory, or a GGUF.")
    ],
    text: Text,
    sequence_length: Annotated[int, typer.Option(min=1, help="Inputs in a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Distance between windows; default: their length.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score at most so many.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of TARGET on a text."""
    from dataclasses import asdict

    with refusing_inputs():
        from zeroskip.evaluate import encode, perplexity
        from zeroskip.progress import without_loading_bars
        from zeroskip.targets import load_target

        with without_loading_bars(as_json):
            loaded, tokenizer = load_target(target)
        tokens = encode(text, tokenizer, max_tokens)
    result = perplexity(
        loaded,
        tokens,
        sequence_length=sequence_length,
        stride=stride,
        progress=not as_json and sys.stderr.isatty(),
    )
    typer.echo(json.dumps(asdict(result), indent=2) if as_json else str(result))


@app.command("inspect", epilog=EXIT_CODES)
def inspect_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory or a GGUF file.")],
    scales: Annotated[
        bool, typer.Option("--scales", help="The groups of channels that scales cancel in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what zeroskip sees in MODEL; no weight of a directory is read.

    --scales: each group of parameters that channel scales cancel in, what it scales, which sign the
    scales must have and which bias can absorb a shift; and for each linear that cannot be scaled,
    the operator that does not allow it.
    """
    if not scales:
        problem = CompileError("there is nothing to say", next_step="add --scales")
        fail(problem, REFUSED)
    with refusing_inputs():
        from zeroskip.progress import without_loading_bars

        with without_loading_bars(as_json):
            source = _source(model)
    from zeroskip.compile import open_program
    from zeroskip.ir.scale_groups import find_scale_groups
    from zeroskip.scale_table import scales_json, scales_table

    found = find_scale_groups(open_program(source))
    typer.echo(json.dumps(scales_json(found), indent=2) if as_json else scales_table(found))


@app.command("passes", epilog=EXIT_CODES)
def passes_command(as_json: Json = False) -> None:
    """List the passes that a recipe can name, and their options."""
    from zeroskip.pass_list import describe_passes, pass_table

    if as_json:
        typer.echo(json.dumps(describe_passes(), indent=2))
        return
    from rich.console import Console

    Console().print(pass_table())


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Say whether the sparse CPU kernels work on this machine, and what is missing.

    Builds the kernel library if there is none yet. Exit codes: 0 the kernels work here, also
    inside ONNX Runtime; 1 they do not, and what to do is said.
    """
    from dataclasses import asdict

    from zeroskip.doctor import examine, findings_table

    found = examine()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        from rich.console import Console

        Console().print(findings_table(found))
    if found.problem:
        fail(CompileError(found.problem, next_step=found.next_step), STOPPED)


@app.command("tune", epilog=EXIT_CODES)
def tune_command(
    directory: Annotated[Path, typer.Argument(help="A folder with model.onnx.")],
    m: Annotated[str, typer.Option(help="Rows (batch x tokens) that matter.")] = "1,16,128",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the session; default: every core.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Measure each pruned linear in DIRECTORY on this machine; make it sparse only where that pays.

    No linear stays sparse that is slower than ONNX Runtime's dense one at any of the rows of --m.
    The model is rewritten when ONNX Runtime computes the same with the new one. Measurements are
    kept: a second run is quick. Run it on the machine that the model will run on, when that has
    nothing else to do.
    """
    with refusing_inputs():
        from zeroskip.runtime.onnx.folder import MODEL_FILE
        from zeroskip.tune import (
            parse_m,
            progress_bar,
            totals,
            tuned_json,
            tuned_table,
        )

        m_values = parse_m(m)
        if not (directory / MODEL_FILE).is_file():
            raise CompileError(
                f"there is no {MODEL_FILE} here",
                where=str(directory),
                next_step="pass the folder that the ONNX export wrote",
            )
    from zeroskip.runtime.machine import available_cores
    from zeroskip.runtime.onnx.tune import tune_folder

    with progress_bar(not as_json and sys.stderr.isatty()) as progress:
        tuned = tune_folder(
            directory,
            m_values=m_values,
            threads=threads or available_cores(),
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(tuned_json(tuned), indent=2))
        return
    if tuned.verdicts:
        typer.echo(f"{tuned_table(tuned)}\n")
    typer.echo(totals(tuned, dry_run=dry_run))


app.command("materialize", epilog=EXIT_CODES)(materialize_command)
app.command("curve", epilog=EXIT_CODES)(curve_command)


def _overridden(
    plan: Recipe,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    memory: str | None,
) -> Recipe:
    """The recipe with the options of the command line in it."""
    from dataclasses import replace

    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    changed = {name: value for name, value in given.items() if value is not None}
    calibration = replace(plan.calibration, **changed)
    return replace(plan, calibration=calibration, memory=memory or plan.memory)


def _calibration(path: Path, tokenizer: Any, plan: Recipe) -> list[dict[str, Any]]:
    from zeroskip.calibration import calibration_from_text

    return calibration_from_text(
        path,
        tokenizer,
        samples=plan.calibration.samples,
        sequence_length=plan.calibration.sequence_length,
        seed=plan.calibration.seed,
    )


def _source(path: Path) -> Any:
    """A directory is compiled from disk; a GGUF file has to be dequantised first."""
    if (path / "config.json").is_file():
        return path
    from zeroskip.models import load_model

    return load_model(path)[0]
