"""The command `zeroskip verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.command_line import Json
from zeroskip.exits import CHANGED, fail, manner, refusing_inputs
from zeroskip.ir.errors import CompileError

if TYPE_CHECKING:
    from zeroskip.verify import Verification


def verify_command(
    directory: Annotated[Path, typer.Argument(help="What `zeroskip compile` wrote.")],
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run the models and compare what they compute.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say whether DIRECTORY is still what was compiled.

    Every file is hashed and compared with manifest.json; then the weights are looked at: shapes,
    densities, the pattern of the zeros, the same weights in ONNX, and with --run the same outputs.
    Files are told apart as tampered (another content), truncated, missing, extra (nobody recorded
    it), stale (an input changed since, or another version of the format) and wrong (digests hold,
    but what is in it contradicts the manifest). A digest is no signature: it does not stop whoever
    computes all of them anew. Exit codes: 0 it is what it was; 4 it is not; 2 there is no manifest.
    """
    with refusing_inputs():
        from zeroskip.progress import without_loading_bars
        from zeroskip.verify import verify_artefact

        with without_loading_bars(as_json):
            found = verify_artefact(directory, run=run)
    if not as_json and (found.findings or not manner().quiet):
        typer.echo("\n".join(_lines(found)))
    if found.findings:
        kinds = ", ".join(sorted({one.kind for one in found.findings}))
        problem = CompileError(
            f"this is not what was compiled: {len(found.findings)} findings ({kinds})",
            where=str(directory),
            next_step="see what is said of each of them",
        )
        fail(problem, CHANGED, _json(found, directory))
    if as_json:
        typer.echo(json.dumps(_json(found, directory), indent=2))


def _json(found: Verification, directory: Path) -> dict[str, Any]:
    from dataclasses import asdict

    return {"directory": str(directory), "intact": not found.findings, **asdict(found)}


def _lines(found: Verification) -> list[str]:
    lines = []
    for one in found.findings:
        # Names in quotes and escaped: what a file says is not to steer a terminal.
        lines += [f"{one.kind:<9}  {_plain(one.file)}: {_plain(one.problem)}"]
        lines += [f"{'':<9}  next: {one.next_step}"]
    lines += [f"not looked at: {_plain(text)}" for text in found.skipped]
    looked_at = ", ".join(f"{number} {thing}" for thing, number in found.checked.items())
    verdict = "it is not what it was" if found.findings else "it is what it was"
    return [*lines, f"{verdict}: looked at {looked_at or 'the manifest'}"]


def _plain(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
