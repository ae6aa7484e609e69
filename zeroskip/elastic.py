"""One elastic artefact on disk: a dense checkpoint, and what makes it sparse at any sparsity.

    checkpoint/           the dense model, an ordinary Hugging Face directory
    elastic.safetensors   for each linear: levels, norms, up, down (see `zeroskip.ir.elastic`)
    elastic.json          what is in it, how it was made, the curve, digests of all files

No file of it is executed or unpickled, and none is believed before it was checked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import zeroskip
from zeroskip.compile import CompiledModel, open_program
from zeroskip.elastic_curve import edge_curve
from zeroskip.elastic_files import hash_files, verify_files
from zeroskip.elastic_manifest import (
    CHECKPOINT,
    MANIFEST_FILE,
    TENSORS_FILE,
    LinearEntry,
    Manifest,
    read_manifest,
    refuse,
    write_manifest,
)
from zeroskip.ir.elastic import LEVELS, Elastic, ElasticLinear, rank_levels
from zeroskip.ir.errors import ArtifactError, CompileError, RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.folders import new_folder
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.weights import all_finite
from zeroskip.passes import PassRecord
from zeroskip.report import plain_options

_PARTS = {"levels": "U8", "norms": "F32", "up": "F32", "down": "F32"}
_LOOKED_AT = 8
"""Rows of each linear that are looked at to see whether levels belong to weights."""


def save_elastic(compiled: CompiledModel, directory: str | Path) -> None:
    """Writes a compiled model that knows `Elastic` as an artefact.

    The directory appears when it is complete, or not at all.

    Args:
        compiled: From a list of passes that ends in `TrainElastic`.
        directory: Must not exist, or be empty.

    Raises:
        RequirementError: It is not elastic, or weights were changed since.
        ArtifactError: The directory is not empty, or cannot be written.
    """
    check_elastic(compiled.program)
    with new_folder(Path(directory)) as folder:
        compiled.save_pretrained(folder / CHECKPOINT)
        write_elastic(compiled.program, folder, compiled.report.passes)


def is_elastic(program: Program) -> bool:
    """Returns whether a program could be saved as an elastic artefact: it is dense and has levels."""
    dense = SparseWeights not in program.facts and program.level == "captured"
    found = program.facts.get(Elastic)
    return dense and isinstance(found, Elastic) and bool(found.linears)


def check_elastic(program: Program) -> None:
    """Raises RequirementError unless a program is elastic, and its levels those of its weights."""
    if not is_elastic(program):
        raise RequirementError(
            "the program is not elastic: it holds no levels, or was pruned or lowered since",
            next_step="end the list of passes with TrainElastic()",
        )
    elastic = program.fact(Elastic)
    for linear in find_linears(program):
        found = elastic.linears.get(linear.name)
        if found is None:
            continue
        weight = linear.weight(program).detach()
        rows = torch.linspace(0, len(weight) - 1, min(_LOOKED_AT, len(weight))).long()
        importance = weight[rows].float().abs() * found.norms
        if not torch.equal(rank_levels(importance, elastic.group_of_weights), found.levels[rows]):
            raise RequirementError(
                "the weights were changed since their levels were found",
                where=linear.name,
                next_step="let TrainElastic() be the last pass that sees the weights",
            )


def write_elastic(program: Program, folder: Path, passes: Sequence[PassRecord]) -> Manifest:
    """Writes elastic.safetensors and elastic.json into a folder with a finished checkpoint/.

    Args:
        program: See `check_elastic`.
        folder: Has the program's weights in checkpoint/.
        passes: What made it.
    """
    elastic = program.fact(Elastic)
    tensors = {
        f"{name}.{part}": getattr(linear, part).clone(memory_format=torch.contiguous_format)
        for name, linear in elastic.linears.items()
        for part in _PARTS
    }
    save_file(tensors, folder / TENSORS_FILE)
    size = elastic.group_of_weights
    manifest = Manifest(
        zeroskip=zeroskip.__version__,
        groups=elastic.groups,
        family=str(size) if size else "rows",
        hierarchy=elastic.hierarchy,
        rank=next(iter(elastic.linears.values())).up.shape[-1],
        linears={n: LinearEntry(e.shape, e.serves_lowest) for n, e in elastic.linears.items()},
        made_by=[_plain(step) for step in passes],
        curve=edge_curve(program),
        measured={},
        files=hash_files(folder),
    )
    write_manifest(manifest, folder)
    return manifest


def write_if_elastic(compiled: CompiledModel, folder: Path) -> bool:
    """Makes a folder with a finished checkpoint/ an artefact if it can be one; returns whether.

    Where weights were changed after `train-elastic`, that is a warning: what was computed is kept.
    """
    if not is_elastic(compiled.program):
        return False
    try:
        check_elastic(compiled.program)
    except RequirementError as error:
        warnings.warn(f"no elastic artefact is written: {error}", stacklevel=2)
        return False
    write_elastic(compiled.program, folder, compiled.report.passes)
    return True


def _plain(step: PassRecord) -> dict[str, Any]:
    text = json.dumps({"pass": step.name, "options": plain_options(step.options)}, default=str)
    found: dict[str, Any] = json.loads(text, parse_constant=str)  # JSON has no infinity.
    return found


def load_elastic(directory: str | Path) -> Program:
    """Opens an artefact; its checkpoint stays on disk, levels and adapters are in memory.

    Raises:
        ArtifactError: Something is missing, truncated, of another version, or not what the
            manifest says.
    """
    return open_elastic(directory)[0]


def open_elastic(directory: str | Path) -> tuple[Program, Manifest]:
    """Opens an artefact as `load_elastic` does; returns its manifest as well."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    verify_files(manifest, directory)
    elastic = _read_tensors(manifest, directory / TENSORS_FILE)
    try:
        program = open_program(directory / CHECKPOINT)
    except ArtifactError:
        raise
    except CompileError as error:
        refuse(directory / CHECKPOINT, f"the checkpoint cannot be opened: {error.problem}")
    if reason := elastic.check(program):
        refuse(directory / MANIFEST_FILE, f"the checkpoint is of another model: {reason}")
    return program.with_fact(elastic), manifest


def _read_tensors(manifest: Manifest, path: Path) -> Elastic:
    names = {f"{name}.{part}" for name in manifest.linears for part in _PARTS}
    linears = {}
    try:
        # Mapped memory of a file that is cut short ends the process; reading raises.
        with safe_open(path, framework="pt", backend="pread") as file:
            if odd := sorted(names ^ set(file.keys())):
                state = "lacks" if odd[0] in names else f"has, unknown to {MANIFEST_FILE},"
                refuse(path, f"{TENSORS_FILE} {state} the tensor {odd[0]!r}")
            for name, entry in manifest.linears.items():
                _check_shapes(file, name, entry, manifest, path)
                parts = {part: file.get_tensor(f"{name}.{part}") for part in _PARTS}
                _check_values(parts, name, manifest.group_of_weights, path)
                linears[name] = ElasticLinear(**parts, serves_lowest=entry.serves_lowest)
    except ArtifactError:
        raise
    except Exception as error:  # safetensors has an error of its own, a child of Exception alone
        refuse(path, f"{TENSORS_FILE} is truncated or damaged: {error}")
    return Elastic(manifest.groups, manifest.group_of_weights, manifest.hierarchy, linears)  # type: ignore[arg-type]


def _check_shapes(file: Any, name: str, entry: LinearEntry, manifest: Manifest, path: Path) -> None:
    (out, width), groups, rank = entry.shape, len(manifest.groups), manifest.rank
    expected = {
        "levels": [out, width],
        "norms": [width],
        "up": [groups, out, rank],
        "down": [groups, rank, width],
    }
    for part, dtype in _PARTS.items():
        stored = file.get_slice(f"{name}.{part}")
        found = (stored.get_dtype(), list(stored.get_shape()))
        if found != (dtype, expected[part]):
            refuse(
                path,
                f"{name}.{part} is {found[0]} {found[1]}, not {dtype} {expected[part]}",
            )


def _check_values(
    parts: Mapping[str, torch.Tensor], name: str, group_of_weights: int, path: Path
) -> None:
    for part in ("norms", "up", "down"):
        if not all_finite(parts[part]):
            refuse(path, f"{name}.{part} holds what is no number")
    if (parts["norms"] < 0).any():
        refuse(path, f"{name}.norms holds negative values")
    levels = parts["levels"].numpy()
    size = group_of_weights or levels.shape[1]
    if levels.shape[1] % size:
        refuse(path, f"{name}.levels: groups of {size} do not divide rows of {levels.shape[1]}")
    # Each group holds every rank once: then masks prune as many weights as they should.
    ranks = (np.arange(size) * LEVELS // size).astype(np.uint8)
    if not (np.sort(levels.reshape(-1, size), axis=1, kind="stable") == ranks).all():
        refuse(path, f"{name}.levels are out of range: they are no ranking of weights")
