"""Sparse checkpoints from an elastic artefact: one folder for each sparsity, as `compile` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zeroskip.compile import materialize
from zeroskip.elastic_manifest import CHECKPOINT, Manifest
from zeroskip.elastic_record import packing
from zeroskip.ir.elastic import Elastic
from zeroskip.ir.errors import PatternError
from zeroskip.ir.folders import new_folder
from zeroskip.ir.program import Program
from zeroskip.manifest import write_manifest
from zeroskip.manifest_inputs import InputFile, name_of, way_back
from zeroskip.passes import ExportOnnx, MaterializeElastic
from zeroskip.passes.base import Pass
from zeroskip.recipe import dump_recipe
from zeroskip.relocation import relocated, under
from zeroskip.report_page import write_report_page


def check_sparsities(manifest: Manifest, sparsities: Sequence[float]) -> None:
    """Refuses sparsities that the artefact cannot have, or that are given twice.

    Raises:
        PatternError: Names the first of them.
    """
    elastic = Elastic(manifest.groups, manifest.group_of_weights)
    for sparsity in sparsities:
        elastic.group(sparsity)
        if sparsity:
            elastic.pattern(sparsity)
    if len(set(sparsities)) < len(sparsities):
        raise PatternError("a sparsity is given twice", next_step="give each of them once")


def write_materialized(
    program: Program,
    manifest: Manifest,
    sparsities: Sequence[float],
    out: Path,
    artefact: Path,
    *,
    onnx: bool = False,
    pack_always: bool = False,
) -> list[dict[str, Any]]:
    """Writes an artefact for each sparsity, which `zeroskip verify` knows; returns the reports.

    One sparsity lies in `out` itself, several in folders named after them. All appear together, or
    none.

    Args:
        program: Of an artefact.
        manifest: Of the same.
        sparsities: Checked by `check_sparsities`.
        out: Must not exist, or be empty.
        artefact: Where the program came from.
        onnx: Whether to write onnx/ as well.
        pack_always: Pack every pruned linear in it, for size; else those where it pays in time.

    Raises:
        CompileError: A model cannot be made or exported, or the folder cannot be written.
    """
    reports = []
    # Hashed when the artefact was opened. Not elastic.json itself, which `curve` may add to.
    inputs = [
        InputFile("model", name_of(artefact / name), entry.bytes, entry.sha256)
        for name, entry in manifest.files.items()
    ]
    with new_folder(out) as folder:
        for sparsity in sparsities:
            name = "" if len(sparsities) == 1 else repr(float(sparsity))
            there = folder / name
            exports: list[Pass] = []
            if onnx:
                exports = [*packing(always=pack_always), ExportOnnx("onnx")]
            compiled = materialize(program, sparsity, [under(step, there) for step in exports])
            compiled.save_pretrained(there / CHECKPOINT)
            report = relocated(compiled.report.to_json(), folder, out.absolute())
            report["elastic"] = {
                "sparsity": sparsity,
                "zeroskip": manifest.zeroskip,
                "made_by": list(manifest.made_by),
            }
            text = json.dumps(report, indent=2, ensure_ascii=False)
            (there / "report.json").write_text(text + "\n", encoding="utf-8")
            ran = dump_recipe([MaterializeElastic(sparsity), *exports], defaults=True)
            (there / "recipe.yaml").write_text(ran, encoding="utf-8")
            write_report_page(there, report, model=f"{artefact.resolve().name} at {sparsity:g}")
            write_manifest(
                there,
                compiled.program,
                report,
                inputs=inputs,
                inputs_from=way_back(out / name),
                recipe=MaterializeElastic.name,
                seed=0,
            )
            reports.append(report)
    return reports
