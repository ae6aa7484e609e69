"""The command `zeroskip compile`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.command_line import Json
from zeroskip.exits import manner, refusing_inputs


def compile_command(
    model: Annotated[
        Path,
        typer.Argument(help="A Hugging Face directory, a GGUF file, or owner/name on the hub."),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A YAML or JSON file, or fast, balanced, best.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is not there yet.")],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Text to calibrate on: UTF-8.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="What passes prune to that do not say it: 50%, 2:4 ...")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of text.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens in each.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Chooses the windows.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget, such as 4GiB.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: max_perplexity_increase=5%, min_speedup=1.2x, ..."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Text that max_perplexity_increase measures on: UTF-8.")
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Write the program before and after each pass here.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no report.")] = False,
) -> None:
    """Compile MODEL by a recipe into a folder.

    OUT appears only when everything succeeded. A run that was stopped leaves finished stages in
    .OUT.work beside it, and the same command goes on with them; where OUT is complete and nothing
    has changed it does nothing. OUT holds checkpoint/ (an ordinary Hugging Face
    directory), recipe.yaml (what ran, every option spelled out), report.json, report.html,
    manifest.json (for `zeroskip verify`), and what the export passes wrote: their relative directories lie under OUT. After a recipe that ends in train-elastic it
    holds elastic.json and elastic.safetensors too, for `zeroskip materialize`. Options override the
    recipe. Gates (max_perplexity_increase, min_speedup, max_bytes, parity) are what has to come out:
    where one fails, the result is kept as OUT.failed instead.
    """
    with ExitStack() as stack:
        with refusing_inputs():
            from zeroskip import compile_job
            from zeroskip.gates import check_decidable
            from zeroskip.hub import local_model
            from zeroskip.ir import process_group
            from zeroskip.parallel import joined_processes
            from zeroskip.presets import find_recipe
            from zeroskip.progress import without_loading_bars
            from zeroskip.recipe_overrides import overridden
            from zeroskip.relocation import check_inside

            stack.enter_context(joined_processes())
            is_first = process_group.is_first()
            stack.enter_context(without_loading_bars(quiet or as_json or not is_first))
            plan = overridden(
                find_recipe(recipe, pattern),
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                calibration=calibration,
                memory=memory,
                gates=gate or (),
                evaluation=evaluation,
            )
            for step in plan.passes:
                check_inside(step)
            check_decidable(plan.gates, plan.passes)
            request = compile_job.Request(local_model(model), recipe, plan, calibration, out)
            if not is_first:
                compile_job.join(request)
                return
            job = compile_job.prepare(request, stack)
        if job is None:
            _say_up_to_date(out, as_json, quiet)
            return
        from zeroskip.passes import DumpPrograms
        from zeroskip.progress import StepLog

        watchers = [DumpPrograms(dump)] if dump else []
        steps = [StepLog()] if manner().verbose else []
        compiled = compile_job.run(job, [*watchers, *steps], progress=not (quiet or as_json))
        written = compile_job.write(job, compiled)
    if as_json:
        typer.echo(written.report)
    elif not quiet:
        typer.echo(written.summary)


def _say_up_to_date(out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8").rstrip())
    elif not quiet:
        typer.echo(f"{out} is up to date")
