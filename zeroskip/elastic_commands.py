"""The commands `zeroskip materialize` and `zeroskip curve`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.exits import refusing_inputs
from zeroskip.ir.errors import CompileError

if TYPE_CHECKING:
    from zeroskip.elastic_manifest import CurvePoint, Manifest

Artefact = Annotated[
    Path, typer.Argument(help="What `zeroskip compile` wrote for a recipe with train-elastic.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def materialize_command(
    artefact: Artefact,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is not there yet.")],
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="0.62; may be repeated.")
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="The highest sparsity recorded with no more.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="The lowest one whose weights take no more: 80MiB.")
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="The lowest one recorded as no slower: milliseconds.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx/--no-onnx", help="Write an ONNX folder as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make plain sparse checkpoints of ARTEFACT, in seconds and without data.

    Give sparsities, or one budget: then a point of the recorded curve is taken (see `zeroskip
    curve`), never one between. OUT is an artefact as `zeroskip compile` writes it, with onnx/ where
    --onnx is given; of several sparsities each has a folder named after it. OUT appears only when
    everything succeeded. In onnx/, linears are packed where that pays in time; with --max-bytes all
    pruned ones are.
    """
    given = list(sparsity or ())
    budget = {
        "max_perplexity": max_perplexity,
        "max_bytes": max_bytes,
        "target_latency": target_latency,
    }
    with refusing_inputs():
        _check_choice(given, budget)
        from zeroskip.elastic import open_elastic
        from zeroskip.elastic_curve import choose_point
        from zeroskip.elastic_manifest import read_manifest
        from zeroskip.ir.folders import check_target
        from zeroskip.ir.streams import parse_bytes
        from zeroskip.materialize import check_sparsities, write_materialized
        from zeroskip.progress import without_loading_bars

        size = None if max_bytes is None else parse_bytes(max_bytes)
        check_target(out)
        manifest = read_manifest(artefact)
        if not given:
            options: dict[str, Any] = {**budget, "max_bytes": size}
            given = [choose_point(manifest.curve, **options).sparsity]
        check_sparsities(manifest, given)
        with without_loading_bars(as_json):
            program, manifest = open_elastic(artefact)
    reports = write_materialized(
        program, manifest, given, out, artefact, onnx=onnx, pack_always=size is not None
    )
    if as_json:
        typer.echo(json.dumps(reports, indent=2, ensure_ascii=False))
        return
    for report in reports:
        made = report["elastic"]["sparsity"]
        where = out if len(reports) == 1 else out / repr(float(made))
        seconds, density = report["seconds"], report["density"]
        typer.echo(f"sparsity {made:g}: density {density:.4f}, {seconds:.1f} s, {where}")


def curve_command(
    artefact: Artefact,
    text: Annotated[
        Path | None, typer.Option("--text", help="Measure perplexity on this text: UTF-8.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the time of a token on this machine.")
    ] = False,
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="Add a point; may be repeated.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Inputs in a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score at most so many.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of ONNX Runtime; default: every core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the sparsities of ARTEFACT are worth; --text and --latency measure them.

    Results are kept in elastic.json, for the budgets of `zeroskip materialize`. Without options it
    only shows what is there. Latency is that of one token after 32 others in ONNX Runtime; measure
    it where the model will run, when that has nothing else to do.
    """
    measures = text is not None or latency or bool(sparsity)
    with refusing_inputs():
        from zeroskip.elastic_manifest import read_manifest, write_manifest

        manifest = read_manifest(artefact)
        if measures:
            from zeroskip.elastic import open_elastic
            from zeroskip.elastic_record import measure_curve, read_tokens
            from zeroskip.materialize import check_sparsities
            from zeroskip.progress import without_loading_bars

            check_sparsities(manifest, sparsity or ())
            with without_loading_bars(as_json):
                tokens = None if text is None else read_tokens(artefact, text, max_tokens)
                program, manifest = open_elastic(artefact)
    if measures:

        def report(point: CurvePoint) -> None:
            if not as_json and sys.stderr.isatty():
                typer.echo(_line(point), err=True)

        manifest = measure_curve(
            program,
            manifest,
            tokens,
            sparsities=sparsity or (),
            latency=latency,
            sequence_length=sequence_length,
            threads=threads,
            report=report,
        )
        from zeroskip.manifest_changes import recording

        with recording(artefact.absolute(), "curve", only="elastic.json"):
            write_manifest(manifest, artefact)
    typer.echo(_json(manifest) if as_json else _table(manifest))


def _check_choice(sparsities: list[float], budget: dict[str, Any]) -> None:
    kinds = [f"--{name.replace('_', '-')}" for name, value in budget.items() if value is not None]
    kinds = [*(["--sparsity"] if sparsities else []), *kinds]
    if len(kinds) == 1:
        return
    raise CompileError(
        f"{' and '.join(kinds)} are given together" if kinds else "no sparsity is given",
        next_step="give --sparsity, or one of --max-perplexity, --max-bytes, --target-latency",
    )


def _json(manifest: Manifest) -> str:
    from dataclasses import asdict

    points = [asdict(point) for point in manifest.curve]
    return json.dumps({"curve": points, "measured": manifest.measured}, indent=2)


def _table(manifest: Manifest) -> str:
    lines = [f"{'sparsity':>8}  {'bytes':>15}  {'perplexity':>10}  {'latency':>12}"]
    lines += [_line(point) for point in manifest.curve]
    # As JSON: what a file says is not to steer a terminal.
    lines += [f"{json.dumps(kind)}: {json.dumps(how)}" for kind, how in manifest.measured.items()]
    return "\n".join(lines)


def _line(point: CurvePoint) -> str:
    perplexity = "-" if point.perplexity is None else f"{point.perplexity:.4f}"
    latency = "-" if point.latency is None else f"{point.latency:.3f} ms"
    return f"{point.sparsity:>8g}  {point.bytes:>15,}  {perplexity:>10}  {latency:>12}"
