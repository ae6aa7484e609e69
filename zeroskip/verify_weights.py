"""What the weights of an artefact say themselves: zeros where the pattern has them, the same in ONNX."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from zeroskip.ir.checkpoint import open_checkpoint
from zeroskip.ir.errors import CompileError
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.weights import count_nonzero
from zeroskip.manifest import LinearRecord, Manifest
from zeroskip.runtime.onnx.folder import MODEL_FILE
from zeroskip.runtime.onnx.parity import LIMIT, PARITY_FILE
from zeroskip.verify import CHECKPOINT, Verification, checked

if TYPE_CHECKING:
    import torch

    from zeroskip.ir.weights import Weights

_WIDEST = 6e-2
"""No export may differ by more, whatever its record says: see `export-onnx`."""


def check_weights(
    manifest: Manifest, directory: Path, found: Verification, *, run: bool = True
) -> None:
    """Compares the checkpoint with the manifest, and every ONNX folder with the checkpoint."""
    try:
        weights = open_checkpoint(directory / CHECKPOINT).weights
    except CompileError as error:
        found.add(f"{CHECKPOINT}/", "wrong", f"the checkpoint cannot be opened: {error.problem}")
        return
    loaded: dict[str, torch.Tensor] = {}
    for name, record in manifest.linears.items():
        if record.parameter not in weights:
            found.add(f"{CHECKPOINT}/", "wrong", f"{name}: there is no weight {record.parameter}")
            continue
        # Experts share a parameter: one is in memory at a time.
        if record.parameter not in loaded:
            loaded = {record.parameter: weights[record.parameter]}
        found.count("linears")
        if problem := linear_problem(record, loaded[record.parameter]):
            found.add(f"{CHECKPOINT}/", "wrong", f"{name}: {problem}")
    for folder in onnx_folders(manifest):
        if found.damaged(folder):
            found.skipped.append(f"{folder}: it is damaged")
            continue
        _check_onnx(directory, folder, weights, found, run)


def linear_problem(record: LinearRecord, parameter: torch.Tensor) -> str | None:
    """Returns how a weight contradicts its record, or None."""
    expected = 2 if record.expert is None else 3
    if parameter.dim() != expected or (record.expert or 0) >= parameter.shape[0]:
        return f"its weight has shape {list(parameter.shape)}"
    matrix = parameter if record.expert is None else parameter[record.expert]
    weight = matrix.T if record.transposed else matrix
    if list(weight.shape) != record.shape:
        return f"it is {list(weight.shape)}, and the manifest says {record.shape}"
    density = count_nonzero(weight) / max(weight.numel(), 1)
    if density != record.density:
        return f"its density is {density:.6f}, and the manifest says {record.density:.6f}"
    if record.pattern == "dense":
        return None
    try:
        broken = parse_pattern(record.pattern).violation(weight != 0)
    except CompileError as error:
        return error.problem
    return broken and f"it is not {record.pattern}: {broken}"


def onnx_folders(manifest: Manifest) -> list[str]:
    """Returns the folders of an artefact that hold an exported model."""
    names = [PurePosixPath(name) for name in manifest.files]
    return [str(name.parent) for name in names if name.name == MODEL_FILE and len(name.parts) > 1]


def _check_onnx(
    directory: Path, folder: str, weights: Weights, found: Verification, run: bool
) -> None:
    file = f"{folder}/{MODEL_FILE}"

    def compare() -> None:
        for name, problem in _differences(directory / file, weights, found):
            found.add(file, "wrong", f"{name}: {problem}")

    before = len(found.findings)
    same = checked(compare, file, found) and len(found.findings) == before
    if not run:
        found.skipped.append(f"{folder}: what it computes, because of --no-run")
    elif same and checked(lambda: _check_parity(directory, folder), file, found):
        found.count("parity")


def _differences(path: Path, weights: Weights, found: Verification) -> Iterator[tuple[str, str]]:
    """Yields each weight of an ONNX file that is not the checkpoint's, and in what."""
    import torch

    from zeroskip.runtime.onnx.stored_weights import stored_weights

    for name, stored in stored_weights(path):
        if name not in weights:
            continue  # A constant of the graph, or a name that `tune` gave.
        found.count("ONNX weights")
        tensor = stored.tensor()
        expected = weights[name].to(tensor.dtype)
        if tensor.shape != expected.shape and tensor.dim() == 2:
            tensor = tensor.T
        if tensor.shape != expected.shape:
            yield name, f"it is {list(tensor.shape)}, not {list(expected.shape)}"
        # Scales of packed int8 values were multiplied in another order: the last bit may differ.
        elif not (
            torch.allclose(tensor, expected, rtol=1e-6, atol=0, equal_nan=True)
            if stored.is_scaled
            else torch.equal(tensor, expected)
        ):
            yield name, f"it is not the weight of the {CHECKPOINT}"


def _check_parity(directory: Path, folder: str) -> None:
    from zeroskip.compile import open_program
    from zeroskip.runtime.onnx.parity import CACHE_CASES, check_parity, plain_cases
    from zeroskip.runtime.onnx.session import open_to_compare

    program = open_program(directory / CHECKPOINT)
    model = open_to_compare(directory / folder)

    def reference(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return list(program.run({name: inputs[name] for name in program.inputs}).values())

    cases = [case for case in CACHE_CASES if program.padding_masks or not case.padding]
    check_parity(
        model,
        reference,
        cases=cases if model.has_cache else plain_cases(model, program.example_inputs),
        limit=_limit(directory / folder / PARITY_FILE),
    )


def _limit(path: Path) -> float:
    """The distance that the export was held to."""
    try:
        limit = json.loads(path.read_text(encoding="utf-8"))["limit"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return LIMIT
    return min(float(limit), _WIDEST) if isinstance(limit, float) and limit > 0 else LIMIT
