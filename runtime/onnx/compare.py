"""Runs two ONNX files on the same random inputs and says how far apart their outputs are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx.custom_ops import session_options

DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def compare_models(old: Path, new: Path, *, with_library: bool = True) -> float:
    """Returns the largest relative distance of the outputs of two models on the same inputs."""
    expected, feeds = _run(old, None, with_library)
    got, _ = _run(new, feeds, with_library)
    distance = 0.0
    for name, value in expected.items():
        if value.dtype.kind != "f":
            distance = max(distance, float(np.any(value != got[name])))
            continue
        # Infinities and NaN must be where they were; what counts is the rest.
        finite = np.isfinite(value) & np.isfinite(got[name])
        if not np.array_equal(value[~finite], got[name][~finite], equal_nan=True):
            return float("inf")
        norm = float(np.linalg.norm(value[finite].astype(np.float64)))
        error = float(np.linalg.norm(got[name][finite].astype(np.float64) - value[finite]))
        distance = max(distance, error / norm if norm else error)
    return distance


def _run(
    path: Path, feeds: dict[str, Any] | None, with_library: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if with_library:
        session_options(options)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        feeds = _random_inputs(session) if feeds is None else feeds
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, feeds), strict=True)), feeds
    # ONNX Runtime raises a family of its own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime cannot run the model: {error}",
            where=str(path),
            next_step="the folder was left as it is; run `zeroskip eval` on it to see what fails",
        ) from error


def _random_inputs(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Inputs of few rows: floats are normal, tokens 0 or 1, masks 1."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 3}
    sizes["total_sequence_length"] = sizes["sequence_length"] + sizes["past_sequence_length"]
    if not any("past" in value.name for value in session.get_inputs()):
        sizes["total_sequence_length"] = sizes["sequence_length"]
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape, dtype = [_size(dim, sizes) for dim in value.shape], DTYPES[value.type]
        if np.issubdtype(dtype, np.floating):
            array = torch.randn(shape, generator=generator).numpy()
        elif "mask" in value.name:
            array = np.ones(shape)
        else:
            array = torch.randint(0, 2, shape, generator=generator).numpy()
        feeds[value.name] = array.astype(dtype)
    return feeds


def _size(dim: int | str | None, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    words = re.findall(r"\w+", dim or "")
    if dim and "+" in dim:
        return sum(int(word) if word.isdigit() else sizes.get(word, 4) for word in words)
    return sizes.get(dim or "", 4)
