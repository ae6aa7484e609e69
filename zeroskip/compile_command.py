"""The command `zeroskip compile`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.command_line import Json
from zeroskip.exits import GateError, manner, refusing_inputs

if TYPE_CHECKING:
    from zeroskip.recipe_document import CalibrationOptions


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
            from zeroskip.compile_key import artefact_key, files_digest
            from zeroskip.gates import check_decidable, prepare_gates
            from zeroskip.hub import local_model
            from zeroskip.ir import process_group
            from zeroskip.ir.folders import aside_of, new_folder, set_aside
            from zeroskip.ir.stage_files import StageFiles
            from zeroskip.manifest_inputs import inputs_of, name_of, way_back
            from zeroskip.models import load_tokenizer, open_source
            from zeroskip.parallel import joined_processes, tell_others, work_along
            from zeroskip.presets import find_recipe
            from zeroskip.progress import without_loading_bars
            from zeroskip.recipe import dump_recipe, recipe_for, without_folders
            from zeroskip.recipe_overrides import overridden
            from zeroskip.relocation import check_inside, relocated, under
            from zeroskip.work_folder import (
                PARTIAL,
                STAGES,
                is_complete,
                is_up_to_date,
                place_of,
                remove_leftovers,
                work_folder,
            )

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
            model = local_model(model)
            tokenizer = load_tokenizer(model)
            if not is_first:
                batches = _calibration(plan.calibration, tokenizer, model)
                stages = place_of(out) / STAGES
                work_along(open_source(model), plan.passes, batches, plan.memory, stages)
                return
            # Before inputs are read, which takes a while: a second run is refused at once.
            work = None if is_complete(out) else stack.enter_context(work_folder(out))
            inputs = inputs_of(model, recipe, calibration, plan)
            key = artefact_key(without_folders(plan), inputs)
            if is_up_to_date(out, key):
                remove_leftovers(out)
                tell_others(False)
                _say_up_to_date(out, as_json, quiet)
                return
            work = work or stack.enter_context(work_folder(out))
            batches = _calibration(plan.calibration, tokenizer, model)
            source = open_source(model)
            baseline = prepare_gates(plan.gates, plan.passes, source, tokenizer, plan.memory)
            folder = stack.enter_context(new_folder(out, work / PARTIAL))
            tell_others(True)
        from zeroskip.compile import compile_sparse
        from zeroskip.elastic import write_if_elastic
        from zeroskip.gate_result import describe_failures, lasting
        from zeroskip.gates import check_gates
        from zeroskip.manifest import write_manifest
        from zeroskip.passes import DumpPrograms
        from zeroskip.progress import StepLog
        from zeroskip.report_page import write_report_page

        compiled = compile_sparse(
            source,
            [under(step, folder) for step in plan.passes],
            calibration=batches,
            memory=plan.memory,
            instruments=[
                *([DumpPrograms(dump)] if dump else []),
                *([StepLog()] if manner().verbose else []),
            ],
            progress=not (quiet or as_json),
            work=StageFiles(
                work / STAGES, files_digest([one for one in inputs if one.role == "model"])
            ),
        )
        compiled.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        write_if_elastic(compiled, folder)
        ran = dump_recipe(recipe_for(plan, out), defaults=True)
        (folder / "recipe.yaml").write_text(ran, encoding="utf-8")
        gates = check_gates(plan.gates, baseline, compiled, plan.passes, folder, plan.memory)
        failed = not all(result.passed for result in gates)
        place = aside_of(out) if failed else out.absolute()
        report = relocated(compiled.report.to_json(), folder, place)
        if gates:
            report["gates"] = [result.to_json() for result in gates]
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        write_report_page(folder, report, model=model.resolve().name, gates=report.get("gates", ()))
        manifest = write_manifest(
            folder,
            compiled.program,
            report,
            inputs=inputs,
            inputs_from=way_back(out),
            recipe=name_of(Path(recipe)),
            seed=plan.calibration.seed,
            key=key,
            gates=lasting(gates),
        )
        if failed:
            set_aside(folder, place)
            raise GateError(describe_failures(gates), str(place), report)
        shown = relocated(str(compiled.report), folder, out)
    if as_json:
        typer.echo(text)
    elif not quiet:
        shown = "\n".join([shown, *(f"gate {result}" for result in gates)])
        typer.echo(f"{shown}\n{out}\ncontent_sha256 {manifest['content_sha256']}")


def _say_up_to_date(out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8").rstrip())
    elif not quiet:
        typer.echo(f"{out} is up to date")


def _calibration(
    options: CalibrationOptions, tokenizer: Any, model: Path
) -> list[dict[str, Any]] | None:
    if options.text is None:
        return None
    from zeroskip.calibration import calibration_for
    from zeroskip.models import load_model

    return calibration_for(options, Path(options.text), tokenizer, lambda: load_model(model)[0])
