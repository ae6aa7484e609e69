"""The command `zeroskip inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.command_line import Json
from zeroskip.exits import REFUSED, fail, refusing_inputs
from zeroskip.ir.errors import CompileError


def inspect_command(
    model: Annotated[
        Path,
        typer.Argument(help="A Hugging Face directory, a GGUF file, an ONNX folder or file."),
    ],
    scales: Annotated[
        bool, typer.Option("--scales", help="The groups of channels that scales cancel in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what zeroskip sees in MODEL; no weight of a directory is read.

    Parameters, linears, the stages that passes will run on, which linears pruners take, and on which
    targets each could run sparse once it is pruned, with the reason where it could not. Of an ONNX
    folder: which linears are packed, their densities and sizes, and what each target makes of them.

    --scales: each group of parameters that channel scales cancel in, what it scales, which sign the
    scales must have and which bias can absorb a shift; and for each linear that cannot be scaled,
    the operator that does not allow it.
    """
    onnx = _onnx_file(model)
    if onnx is not None:
        if scales:
            problem = CompileError(
                "groups of scales are found in models, not in ONNX files",
                where=str(model),
                next_step="inspect the checkpoint that it was made from",
            )
            fail(problem, REFUSED)
        _inspect_onnx(onnx, as_json)
        return
    if (model / "checkpoint" / "config.json").is_file():
        model = model / "checkpoint"  # Of an artefact.
    with refusing_inputs():
        from zeroskip.compile import open_program
        from zeroskip.hub import local_model
        from zeroskip.models import open_source
        from zeroskip.progress import without_loading_bars

        with without_loading_bars(as_json):
            program = open_program(open_source(local_model(model)))
    if not scales:
        from zeroskip.inspect_table import summarize

        summary = summarize(program)
        typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else str(summary))
        return
    from zeroskip.ir.scale_groups import find_scale_groups
    from zeroskip.scale_table import scales_json, scales_table

    found = find_scale_groups(program)
    typer.echo(json.dumps(scales_json(found), indent=2) if as_json else scales_table(found))


def _onnx_file(model: Path) -> Path | None:
    """The ONNX file that a path stands for; None for what is to be opened as a model.

    An artefact stands for its checkpoint; its onnx/ is inspected by that path.
    """
    if model.suffix == ".onnx" and model.is_file():
        return model
    path = model / "model.onnx"
    return path if path.is_file() else None


def _inspect_onnx(path: Path, as_json: bool) -> None:
    with refusing_inputs():
        from zeroskip.inspect_table import onnx_json, onnx_table
        from zeroskip.runtime.onnx.stored_linears import stored_linears

        linears = stored_linears(path)
    found = onnx_json(path, linears) if as_json else onnx_table(path, linears)
    typer.echo(json.dumps(found, indent=2) if as_json else found)
