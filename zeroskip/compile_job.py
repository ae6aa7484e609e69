"""One compilation of the command line: all that it needs, checked, and the artefact that it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroskip.batches import read_batches
from zeroskip.calibration import calibration_for
from zeroskip.compile import CompiledModel, compile_program, open_program
from zeroskip.compile_key import artefact_key, files_digest
from zeroskip.elastic import write_if_elastic
from zeroskip.exits import GateError
from zeroskip.gate_measures import Baseline
from zeroskip.gate_result import describe_failures, lasting
from zeroskip.gates import check_gates, prepare_gates
from zeroskip.ir.folders import aside_of, new_folder, set_aside
from zeroskip.ir.program import Program
from zeroskip.ir.stage_files import StageFiles
from zeroskip.manifest import write_manifest
from zeroskip.manifest_inputs import InputFile, inputs_of, name_of, way_back
from zeroskip.models import load_model, load_tokenizer, open_source
from zeroskip.parallel import tell_others, work_along
from zeroskip.passes.manager import check_passes
from zeroskip.recipe import Recipe, dump_recipe, recipe_for, without_folders
from zeroskip.relocation import relocated, under
from zeroskip.report_page import write_report_page
from zeroskip.work_folder import (
    PARTIAL,
    STAGES,
    is_complete,
    is_up_to_date,
    place_of,
    remove_leftovers,
    work_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zeroskip.passes import Instrument


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        model: A Hugging Face directory or a GGUF file.
        recipe: As it was named.
        plan: The recipe, with what the command line says.
        calibration: The text that the command line names, if it does.
        out: The artefact.
    """

    model: Path
    recipe: str
    plan: Recipe
    calibration: Path | None
    out: Path

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]] | None:
        """Returns the calibration data; None when the recipe has no text."""
        options = self.plan.calibration
        if options.text is None:
            return None
        return calibration_for(
            options, Path(options.text), tokenizer, lambda: load_model(self.model)[0]
        )


@dataclass(frozen=True, eq=False)
class CompileJob:
    """A compilation whose inputs were found to be usable.

    Args:
        request: What was asked for.
        tokenizer: Of the model.
        inputs: Every file that is read, and its digest.
        key: What decides whether an artefact is up to date.
        live: The module, where the model is not read from a directory.
        program: The model, captured; it holds the calibration data.
        baseline: What gates compare with.
        work: Where finished stages are kept.
        folder: The unfinished artefact.
    """

    request: Request
    tokenizer: PreTrainedTokenizerBase
    inputs: list[InputFile]
    key: dict[str, Any]
    live: torch.nn.Module | None
    program: Program
    baseline: Baseline
    work: Path
    folder: Path


@dataclass(frozen=True)
class Written:
    """An artefact, complete.

    Args:
        report: What report.json holds.
        summary: What a person reads.
    """

    report: str
    summary: str


def prepare(request: Request, stack: ExitStack) -> CompileJob | None:
    """Locks the target, reads and checks every input; returns None when the artefact is up to date.

    Args:
        request: What is asked for.
        stack: Holds the lock and the unfinished folder.

    Raises:
        CompileError: Something cannot be used, or another run is at work there.
    """
    plan, out = request.plan, request.out
    tokenizer = load_tokenizer(request.model)
    # Before inputs are read, which takes a while: a second run is refused at once.
    work = None if is_complete(out) else stack.enter_context(work_folder(out))
    inputs = inputs_of(request.model, request.recipe, request.calibration, plan)
    key = artefact_key(without_folders(plan), inputs)
    if is_up_to_date(out, key):
        remove_leftovers(out)
        tell_others(False)
        return None
    work = work or stack.enter_context(work_folder(out))
    batches = read_batches(request.batches(tokenizer))
    source = open_source(request.model)
    program = open_program(source, None, batches)
    check_passes([under(step, out) for step in plan.passes], program)
    baseline = prepare_gates(plan.gates, plan.passes, program, tokenizer, plan.memory)
    folder = stack.enter_context(new_folder(out, work / PARTIAL))
    tell_others(True)
    live = source if isinstance(source, torch.nn.Module) else None
    return CompileJob(request, tokenizer, inputs, key, live, program, baseline, work, folder)


def join(request: Request) -> None:
    """Does the share of a process that is not the first."""
    batches = request.batches(load_tokenizer(request.model))
    stages = place_of(request.out) / STAGES
    plan = request.plan
    work_along(open_source(request.model), plan.passes, batches, plan.memory, stages)


def run(job: CompileJob, instruments: Sequence[Instrument], *, progress: bool) -> CompiledModel:
    """Compiles; finished stages are kept, and those of a run before are taken over."""
    plan = job.request.plan
    read = files_digest([file for file in job.inputs if file.role == "model"])
    return compile_program(
        job.program,
        [under(step, job.folder) for step in plan.passes],
        live=job.live,
        memory=plan.memory,
        instruments=instruments,
        progress=progress,
        files=StageFiles(job.work / STAGES, read),
    )


def write(job: CompileJob, compiled: CompiledModel) -> Written:
    """Writes the artefact; what a gate refuses is kept under another name.

    Raises:
        GateError: A gate failed.
    """
    plan, out, folder = job.request.plan, job.request.out, job.folder
    compiled.save_pretrained(folder / "checkpoint")
    job.tokenizer.save_pretrained(folder / "checkpoint")
    write_if_elastic(compiled, folder)
    ran = dump_recipe(recipe_for(plan, out), defaults=True)
    (folder / "recipe.yaml").write_text(ran, encoding="utf-8")
    gates = check_gates(plan.gates, job.baseline, compiled, plan.passes, folder, plan.memory)
    failed = not all(result.passed for result in gates)
    place = aside_of(out) if failed else out.absolute()
    report = relocated(compiled.report.to_json(), folder, place)
    if gates:
        report["gates"] = [result.to_json() for result in gates]
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    name = job.request.model.resolve().name
    write_report_page(folder, report, model=name, gates=report.get("gates", ()))
    manifest: Mapping[str, Any] = write_manifest(
        folder,
        compiled.program,
        report,
        inputs=job.inputs,
        inputs_from=way_back(out),
        recipe=name_of(Path(job.request.recipe)),
        seed=plan.calibration.seed,
        key=job.key,
        gates=lasting(gates),
    )
    if failed:
        set_aside(folder, place)
        raise GateError(describe_failures(gates), str(place), report)
    shown = [relocated(str(compiled.report), folder, out), *(f"gate {result}" for result in gates)]
    summary = "\n".join([*shown, str(out), f"content_sha256 {manifest['content_sha256']}"])
    return Written(text, summary)
