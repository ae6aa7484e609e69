"""The command `zeroskip compile`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.exits import refusing_inputs

if TYPE_CHECKING:
    from zeroskip.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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

    OUT appears only when everything succeeded. A run that was stopped leaves finished stages in
    .OUT.work beside it, and the same command goes on with them; where OUT is complete and nothing
    has changed it does nothing. OUT holds checkpoint/ (an ordinary Hugging Face
    directory), recipe.yaml (what ran, every option spelled out), report.json, report.html,
    manifest.json (for `zeroskip verify`), and what the export passes wrote: their relative directories lie under OUT. After a recipe that ends in train-elastic it
    holds elastic.json and elastic.safetensors too, for `zeroskip materialize`. --samples, --sequence-length, --seed and
    --memory override the recipe.
    """
    with ExitStack() as stack:
        with refusing_inputs():
            from zeroskip.compile_key import artefact_key, files_digest
            from zeroskip.ir.folders import new_folder
            from zeroskip.ir.stage_files import StageFiles
            from zeroskip.manifest_inputs import inputs_of, name_of, way_back
            from zeroskip.models import load_tokenizer, open_source
            from zeroskip.presets import find_recipe
            from zeroskip.progress import without_loading_bars
            from zeroskip.recipe import dump_recipe
            from zeroskip.relocation import relocated, under
            from zeroskip.work_folder import (
                PARTIAL,
                STAGES,
                is_complete,
                is_up_to_date,
                work_folder,
            )

            stack.enter_context(without_loading_bars(quiet or as_json))
            plan = _overridden(find_recipe(recipe, pattern), samples, sequence_length, seed, memory)
            tokenizer = load_tokenizer(model)
            # Before inputs are read, which takes a while: a second run is refused at once.
            work = None if is_complete(out) else stack.enter_context(work_folder(out))
            inputs = inputs_of(model, recipe, calibration, plan)
            key = artefact_key(plan, inputs)
            if is_up_to_date(out, key):
                _say_up_to_date(out, as_json, quiet)
                return
            work = work or stack.enter_context(work_folder(out))
            batches = _calibration(calibration, tokenizer, plan) if calibration else None
            source = open_source(model)
            folder = stack.enter_context(new_folder(out, work / PARTIAL))
        from zeroskip.compile import compile_sparse
        from zeroskip.elastic import write_if_elastic
        from zeroskip.manifest import write_manifest
        from zeroskip.passes import DumpPrograms
        from zeroskip.report_page import write_report_page

        compiled = compile_sparse(
            source,
            [under(step, folder) for step in plan.passes],
            calibration=batches,
            memory=plan.memory,
            instruments=[DumpPrograms(dump)] if dump else [],
            progress=not (quiet or as_json),
            work=StageFiles(
                work / STAGES, files_digest([one for one in inputs if one.role == "model"])
            ),
        )
        compiled.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        write_if_elastic(compiled, folder)
        (folder / "recipe.yaml").write_text(dump_recipe(plan, defaults=True), encoding="utf-8")
        report = relocated(compiled.report.to_json(), folder, out.absolute())
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        write_report_page(folder, report, model=model.resolve().name)
        manifest = write_manifest(
            folder,
            compiled.program,
            report,
            inputs=inputs,
            inputs_from=way_back(out),
            recipe=name_of(Path(recipe)),
            seed=plan.calibration.seed,
            key=key,
        )
        shown = relocated(str(compiled.report), folder, out)
    if as_json:
        typer.echo(text)
    elif not quiet:
        typer.echo(f"{shown}\n{out}\ncontent_sha256 {manifest['content_sha256']}")


def _say_up_to_date(out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8").rstrip())
    elif not quiet:
        typer.echo(f"{out} is up to date")


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
