"""Makes each linear of an exported folder sparse or dense, whichever was measured to be faster here.

The file is replaced at once or not at all, after ONNX Runtime computed the same with it. Nothing is
lost: another machine can choose otherwise later.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
from onnx import ModelProto

from zeroskip.ir.errors import ArtifactError, KernelLibraryError, ParityError
from zeroskip.runtime.dispatch import Verdict, judge
from zeroskip.runtime.machine import cpu_name
from zeroskip.runtime.onnx.compare import compare_models
from zeroskip.runtime.onnx.folder import (
    DATA_FILE,
    EXTERNAL_DATA_THRESHOLD,
    MODEL_FILE,
    PACKED_THRESHOLD,
)
from zeroskip.runtime.onnx.repack import (
    Replacement,
    make_dense,
    make_sparse,
    pack,
    replace_linears,
)
from zeroskip.runtime.onnx.sparse_linear import add_functions, is_sparse_linear, walk
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN
from zeroskip.runtime.onnx.tunable import Tunable, find_tunables
from zeroskip.runtime.tuning import Tuner
from zeroskip.runtime.tuning_cache import write_atomically

TUNE_FILE = "zeroskip_tune.json"
OTHER_DATA_FILE = "model.onnx.tuned.data"
"""The data of a new model lies beside the old one's until the model is replaced; names alternate."""
LIMIT = 1e-5
ROUNDED_LIMIT = 2e-2
"""Where a linear that rounds its activations to 8 bits was made dense, or the other way round."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning decided.

    Args:
        verdicts: Name of the node to the verdict.
        changed: The linears that run in another form, or layout, than before.
        distance: Relative distance of the new model's outputs from the old one's; None where
            nothing was written.
        weights: Name of the node to that of its weight, which says more to people.
    """

    verdicts: Mapping[str, Verdict]
    changed: tuple[str, ...]
    distance: float | None
    weights: Mapping[str, str] = field(default_factory=dict)


def tune_folder(
    directory: str | Path,
    *,
    m_values: Sequence[int] = (1, 128),
    threads: int = 1,
    layouts: Sequence[int] = (0, 1),
    dry_run: bool = False,
    progress: Progress | None = None,
    tuner: Tuner | None = None,
) -> Tuned:
    """Measures every linear of a folder, sparse and dense, and rewrites the model accordingly.

    The model is in memory once, and twice while both are compared. Without a kernel library all
    linears become dense.

    Args:
        directory: Holds model.onnx. zeroskip_tune.json is written there, too.
        m_values: Rows of x at which no linear may be slower than dense.
        threads: Threads of the session that it will run in.
        layouts: Those that may be used; 1 takes memory besides the file.
        dry_run: Writes nothing.
        progress: Called before each linear with how many are done, how many there are, its name.
        tuner: What measures; by default a new one with the cache of this user.

    Raises:
        ArtifactError: There is no model, or it cannot be read or written.
        ParityError: The new model does not compute what the old one did; nothing is changed.
    """
    folder = Path(directory)
    model = _load(folder)
    linears, working_set = find_tunables(model)
    if tuner is None:
        with contextlib.suppress(KernelLibraryError):  # judge() says so for every linear.
            tuner = Tuner()
    verdicts: dict[str, Verdict] = {}
    for i, linear in enumerate(linears):
        if progress is not None:
            progress(i, len(linears), linear.name)
        packed = pack(model, linear)
        verdict = judge(
            packed.weight,
            m_values=m_values,
            threads=threads,
            accuracy_level=packed.accuracy_level,
            layouts=layouts,
            source="measure",
            working_set_bytes=working_set,
            tuner=tuner,
        )
        if packed.note:
            verdict = replace(verdict, reason=f"{verdict.reason}; {packed.note}")
        verdicts[linear.name] = verdict
    weights = {linear.name: _weight_name(linear) for linear in linears}
    changed = tuple(linear.name for linear in linears if _differs(linear, verdicts[linear.name]))
    if dry_run:
        return Tuned(verdicts, changed, None, weights)
    distance = None
    if changed:
        wanted = [linear for linear in linears if linear.name in changed]
        limit = _rewrite(model, linears, wanted, verdicts)
        with_library = tuner is not None
        distance = _replace_model(folder, model, limit, with_library)
    _write_record(folder, verdicts, m_values, threads, tuner)
    return Tuned(verdicts, changed, distance, weights)


def _load(folder: Path) -> ModelProto:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ArtifactError(
            f"there is no {MODEL_FILE} here",
            where=str(folder),
            next_step="pass the folder that the ONNX export wrote",
        )
    try:
        return onnx.load(path)
    # Parsers raise errors of their own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"the model cannot be read: {error}", where=str(path), next_step="export it again"
        ) from error


def _weight_name(linear: Tunable) -> str:
    """The name of a weight, of a packed one the part that its tensors share."""
    if not linear.is_sparse:
        return linear.weight
    return re.sub(r"[._]bitmask$", "", linear.product.input[1])


def _differs(linear: Tunable, verdict: Verdict) -> bool:
    if linear.is_sparse != (verdict.choice == "sparse"):
        return True
    return linear.is_sparse and linear.layout != verdict.layout


def _rewrite(
    model: ModelProto,
    linears: Sequence[Tunable],
    changed: Sequence[Tunable],
    verdicts: Mapping[str, Verdict],
) -> float:
    """Changes the model; returns how far its outputs may be from those before."""
    sparse = [linear for linear in linears if verdicts[linear.name].choice == "sparse"]
    # All nodes share one body: where one has scales, all have.
    with_scales = any(verdicts[linear.name].value_type == "int8" for linear in sparse)
    replacements: list[Replacement] = []
    limit = LIMIT
    for linear in linears:
        verdict = verdicts[linear.name]
        lacks_scales = (
            with_scales
            and linear.is_sparse
            and (len(linear.product.input) < 5 or not linear.product.input[4])
        )
        if linear not in changed and not (lacks_scales and verdict.choice == "sparse"):
            continue
        packed = pack(model, linear)
        if packed.accuracy_level and linear.is_sparse != (verdict.choice == "sparse"):
            limit = ROUNDED_LIMIT
        if verdict.choice == "sparse":
            replacements.append(make_sparse(model, linear, packed, verdict.layout, with_scales))
        else:
            replacements.append(make_dense(model, linear, packed))
    replace_linears(model, replacements)
    add_functions(model)
    if not any(is_sparse_linear(node) for node in walk(model.graph)):
        for i in reversed(range(len(model.opset_import))):
            if model.opset_import[i].domain == DOMAIN:
                del model.opset_import[i]
    return limit


def _replace_model(folder: Path, model: ModelProto, limit: float, with_library: bool) -> float:
    """Writes the new model beside the old one, compares both, and puts it in its place."""
    path = folder / MODEL_FILE
    before = _data_files(path)
    data = OTHER_DATA_FILE if DATA_FILE in before else DATA_FILE
    try:
        work = Path(tempfile.mkdtemp(prefix=".tune.", dir=folder))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
        packed = any(is_sparse_linear(node) for node in walk(model.graph))
        external = bool(before) or size > (PACKED_THRESHOLD if packed else EXTERNAL_DATA_THRESHOLD)
        onnx_ir.save(
            onnx_ir.from_proto(model),
            work / MODEL_FILE,
            external_data=data if external else None,
            # Kernels use packed weights in the mapped file: each begins where its type may.
            alignment=4096 if packed else None,
            align_threshold=0,
        )
        distance = compare_models(path, work / MODEL_FILE, with_library=with_library)
        if not distance <= limit:
            raise ParityError(
                f"the tuned model is {distance:.1e} away from what it was, more than {limit:g}",
                where=str(path),
                next_step="the folder was left as it is; run `zeroskip doctor`, and report this",
            )
        # The data first: the model that is in place always finds its own.
        if external:
            os.replace(work / data, folder / data)
        os.replace(work / MODEL_FILE, path)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name in before - _data_files(path):
        (folder / name).unlink(missing_ok=True)
    return distance


def _cannot_write(folder: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"the tuned model cannot be written: {error}",
        where=str(folder),
        next_step="free space or permissions there and try again; the model is as it was",
    )


def _data_files(path: Path) -> set[str]:
    """The files in the folder that a model keeps weights in."""
    model = onnx.load(path, load_external_data=False)
    return {
        item.value
        for tensor in model.graph.initializer
        for item in tensor.external_data
        if item.key == "location" and "/" not in item.value
    }


def _write_record(
    folder: Path,
    verdicts: Mapping[str, Verdict],
    m_values: Sequence[int],
    threads: int,
    tuner: Tuner | None,
) -> None:
    record = {
        "machine": {
            "cpu": cpu_name(),
            "instruction_sets": list(tuner.instruction_sets) if tuner is not None else [],
            "zeroskip": version("zeroskip"),
            "onnxruntime": onnxruntime.__version__,
        },
        "m": list(m_values),
        "threads": threads,
        "linears": {name: verdict.to_json() for name, verdict in verdicts.items()},
    }
    try:
        write_atomically(folder / TUNE_FILE, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from error
