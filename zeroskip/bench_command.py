"""The command `zeroskip bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeroskip.command_line import Json
from zeroskip.exits import manner, refusing_inputs

if TYPE_CHECKING:
    from zeroskip.runtime.onnx.paired_speed import PairedSpeed


def bench_command(
    directory: Annotated[
        Path, typer.Argument(help="A folder with model.onnx, or an artefact that holds onnx/.")
    ],
    dense: Annotated[
        Path | None,
        typer.Option(help="What to hold it against: such a folder; default: its own dense form."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Lengths of input; 1: a step behind 32 tokens in the cache.")
    ] = "1,128",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of ONNX Runtime; default: every core.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=5, help="At most, for each length.")] = 25,
    seconds: Annotated[float, typer.Option(min=0.0, help="About, for each length.")] = 20.0,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Memory and load time as well.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure whether the zeros of DIRECTORY pay on this machine, and say so.

    The model and its dense form take turns in one process; ratios are taken within each round, and
    medians count. Where half of the rounds do not agree that one is faster, it says that it cannot
    tell. Memory is that of a process of its own. Run it where the model will run, when that has
    nothing else to do.
    """
    with refusing_inputs():
        from zeroskip.bench import bench, check_packed, find_model, parse_tokens

        lengths = parse_tokens(tokens)
        model = find_model(directory)
        against = None if dense is None else find_model(dense)
        if against is None:
            check_packed(model)
    from zeroskip.runtime.machine import available_cores

    def report(speed: PairedSpeed) -> None:
        if manner().shows_progress:
            typer.echo(f"{speed.tokens} tokens: {speed.speedup.median:.2f}x", err=True)

    found = bench(
        model,
        against,
        lengths,
        threads=threads or available_cores(),
        rounds=rounds,
        seconds=seconds,
        memory=memory,
        report=report,
    )
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
