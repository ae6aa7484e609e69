"""The command `zeroskip sensitivity`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.command_line import Json
from zeroskip.exits import manner, refusing_inputs


def sensitivity_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory or a GGUF file.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", "-c", help="Text to measure on: UTF-8.")
    ],
    sparsities: Annotated[
        str | None, typer.Option(help="Shares to prune: 50,60,70 or 0.5,0.6.")
    ] = None,
    densities: Annotated[str | None, typer.Option(help="The same as shares to keep.")] = None,
    patterns: Annotated[str, typer.Option(help="N:M patterns as well; empty: none.")] = "2:4",
    include: Annotated[
        list[str] | None, typer.Option(help="Shell-style pattern of linears; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Linears to leave out; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens in each.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the windows.")] = 0,
    memory: Annotated[str, typer.Option(help="Memory budget, such as 4GiB.")] = "4GiB",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder that is not there yet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how much each linear of MODEL suffers from pruning, at several sparsities.

    The text runs once through the dense model. The error of a linear is ||Y' - Y|| / ||Y|| of its
    own output when it alone is pruned as Wanda does; nothing is changed. OUT gets sensitivity.json,
    sensitivity.csv and sensitivity.html with a heat map and curves.
    """
    with refusing_inputs():
        from zeroskip.calibration import calibration_from_text
        from zeroskip.compile import open_program
        from zeroskip.hub import local_model
        from zeroskip.ir.folders import check_target
        from zeroskip.ir.selection import check_selection
        from zeroskip.ir.streams import parse_bytes
        from zeroskip.models import load_tokenizer, open_source
        from zeroskip.progress import without_loading_bars
        from zeroskip.sensitivity import (
            LinearSensitivity,
            Sensitivity,
            number_or_none,
            patterns_of,
            write_sensitivity,
        )

        wanted = patterns_of(sparsities, densities, patterns)
        parse_bytes(memory)
        if out is not None:
            check_target(out)
        with without_loading_bars(as_json):
            model = local_model(model)
            tokenizer = load_tokenizer(model)
            batches = calibration_from_text(
                calibration,
                tokenizer,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
            )
            source = open_source(model)
        program = open_program(source, batches=batches)
        check_selection(program, tuple(include or ()), tuple(exclude or ()))
    from zeroskip.ir.selection import select_linears
    from zeroskip.passes.measure_sensitivity import measure_sensitivity
    from zeroskip.progress import ProgressBar

    started = time.perf_counter()
    chosen = (tuple(include or ()), tuple(exclude or ()))
    measured = measure_sensitivity(
        program,
        wanted,
        include=chosen[0],
        exclude=chosen[1],
        memory=memory,
        instruments=[ProgressBar()] if manner().shows_progress else [],
    )
    columns = tuple(str(pattern) for pattern in wanted)
    linears = select_linears(program, *chosen)
    found = Sensitivity(
        model=model.resolve().name,
        columns=columns,
        linears=tuple(
            LinearSensitivity(
                linear.name,
                linear.shape,
                dict(zip(columns, map(number_or_none, measured[linear.name]), strict=True)),
            )
            for linear in linears
            if linear.name in measured
        ),
        unseen=tuple(linear.name for linear in linears if linear.name not in measured),
        tokens=sum(int(batch["input_ids"].numel()) for batch in batches),
        seconds=time.perf_counter() - started,
    )
    if out is not None:
        write_sensitivity(found, out)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(str(found) + (f"\n{out}" if out is not None else ""))
