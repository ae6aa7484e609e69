"""The command `zeroskip`.

Problems go to stderr: what is wrong, where, in which pass, and the next step to take; results go to
stdout. With --json, stdout holds one document and nothing else, also when something is wrong. Exit
codes are in `zeroskip.exits`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from zeroskip.bench_command import bench_command
from zeroskip.command_line import CommandLine, Json
from zeroskip.compile_command import compile_command
from zeroskip.elastic_commands import curve_command, materialize_command
from zeroskip.exits import EXIT_CODES, REFUSED, STOPPED, fail, manner, refusing_inputs
from zeroskip.inspect_command import inspect_command
from zeroskip.ir.errors import CompileError
from zeroskip.recipe_commands import app as recipe_app
from zeroskip.sensitivity_command import sensitivity_command
from zeroskip.verify_command import verify_command

# Everything that imports torch is imported inside the commands: `zeroskip --help` is instant.

app = CommandLine(
    name="zeroskip",
    help="A compiler for post-training sparsity.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text = Annotated[Path, typer.Option("--text", help="The text to score: a UTF-8 file.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; always ends in SystemExit."""
    app.run(sys.argv[1:] if arguments is None else arguments)


@app.command("export")
def export_command(
    source: Annotated[
        Path, typer.Argument(help="A folder with model.onnx, a Hugging Face directory, or a GGUF.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is not there yet.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Unpack the weights: for runtimes without the kernels.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write SOURCE as an ONNX folder.

    A checkpoint is exported as it is. Of an ONNX folder with packed weights, --dense writes the
    plain form: standard operators and dense weights, zeros included.
    """
    from zeroskip.export import MODEL_FILE, export_dense, export_program, open_to_export

    if (source / MODEL_FILE).is_file():
        if not dense:
            problem = CompileError(
                "this is an ONNX folder already", where=str(source), next_step="add --dense"
            )
            fail(problem, REFUSED)
        with refusing_inputs():
            from zeroskip.runtime.onnx.stored_linears import check_readable

            check_readable(source / MODEL_FILE)
        count = export_dense(source, out)
        _exported(out, f"{count} packed linears are dense in {out}", as_json, unpacked=count)
        return
    with refusing_inputs():
        from zeroskip.hub import local_model
        from zeroskip.ir.folders import check_target

        check_target(out)
        opened = open_to_export(local_model(source))
    export_program(*opened, out)
    _exported(out, str(out), as_json)


def _exported(out: Path, text: str, as_json: bool, **more: int) -> None:
    if as_json:
        typer.echo(json.dumps({"directory": str(out), **more}, indent=2))
    elif not manner().quiet:
        typer.echo(text)


@app.command("eval")
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
        from zeroskip.hub import local_model
        from zeroskip.progress import without_loading_bars
        from zeroskip.targets import load_target

        with without_loading_bars(as_json):
            loaded, tokenizer = load_target(local_model(target))
        tokens = encode(text, tokenizer, max_tokens)
    result = perplexity(
        loaded,
        tokens,
        sequence_length=sequence_length,
        stride=stride,
        progress=manner().shows_progress,
    )
    typer.echo(json.dumps(asdict(result), indent=2) if as_json else str(result))


@app.command("passes")
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
    if not as_json:
        from rich.console import Console

        Console().print(findings_table(found))
    if found.problem:
        problem = CompileError(found.problem, next_step=found.next_step)
        fail(problem, STOPPED, asdict(found))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))


@app.command("tune")
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
        from zeroskip.runtime.onnx.stored_linears import check_readable
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
        check_readable(directory / MODEL_FILE)
    from zeroskip.manifest_changes import recording
    from zeroskip.runtime.machine import available_cores
    from zeroskip.runtime.onnx.tune import tune_folder

    changes = contextlib.nullcontext() if dry_run else recording(directory.absolute(), "tune")
    with changes, progress_bar(manner().shows_progress) as progress:
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


app.command("compile")(compile_command)
app.command("inspect")(inspect_command)
app.command("sensitivity")(sensitivity_command)
app.command("bench")(bench_command)
app.command("materialize")(materialize_command)
app.command("curve")(curve_command)
app.command("verify")(verify_command)
app.add_typer(recipe_app, name="recipe")
