"""Two forms of an ONNX model against each other, in one process and in turns."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.bench import Spread, compare
from zeroskip.runtime.onnx.compare import DTYPES
from zeroskip.runtime.onnx.custom_ops import session_options, uses_sparse_linear
from zeroskip.runtime.timing import clock

CONTEXT = 32
"""Tokens in the cache when a single one is decoded."""
PAUSE = 0.002


@dataclass(frozen=True)
class PairedSpeed:
    """What two forms took on the same input.

    Args:
        tokens: In the input.
        context: In the cache before it.
        sparse: Seconds of a call of the first form.
        dense: Of the second.
        sparse_cpu: CPU seconds of all threads.
        dense_cpu: The same of the second.
        speedup: Time of the second over that of the first, within each round.
        rounds: How often each had its turn.
        distance: Of the outputs, relative.
        warnings: What disturbed the measurement.
    """

    tokens: int
    context: int
    sparse: Spread
    dense: Spread
    sparse_cpu: Spread
    dense_cpu: Spread
    speedup: Spread
    rounds: int
    distance: float
    warnings: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """`faster`, `slower`, or `undecided` where half of the rounds do not agree with the median."""
        if self.speedup.low > 1:
            return "faster"
        return "slower" if self.speedup.high < 1 else "undecided"


def compare_speed(
    model: Path,
    dense: Path,
    tokens: Sequence[int],
    *,
    threads: int,
    rounds: int = 15,
    seconds: float = 20.0,
    report: Callable[[PairedSpeed], None] | None = None,
) -> list[PairedSpeed]:
    """Times two ONNX files at several lengths of input.

    With one thread, speed-ups are those of its CPU time, which neighbours disturb least; with more,
    of wall time.

    Args:
        model: The first.
        dense: What it is to be faster than.
        tokens: Lengths of input: 1 is a step of decoding behind `CONTEXT` others where the model has a
            cache.
        threads: Within an operator.
        rounds: At most so many for each length.
        seconds: After about so long no new round is begun; five are run in any case.
        report: Called with each length that is done.

    Raises:
        ArtifactError: ONNX Runtime cannot open or run one of them.
        KernelLibraryError: The model has packed weights, and there are no kernels here.
    """
    sessions = {"sparse": open_timed(model, threads), "dense": open_timed(dense, threads)}
    found = []
    for count in tokens:
        feeds, context = make_feeds(sessions["sparse"], count)
        outputs = {
            name: run_once(session, feeds, path)
            for (name, session), path in zip(sessions.items(), (model, dense), strict=True)
        }
        compared = compare(
            {name: partial(each.run, None, feeds) for name, each in sessions.items()},
            "dense",
            rounds=rounds,
            seconds=seconds,
            settle=1,
            pause=PAUSE if threads > 1 else 0.0,
            clock="thread" if clock(threads) is time.thread_time else "wall",
        )
        first, second = compared.timings["sparse"], compared.timings["dense"]
        found.append(
            PairedSpeed(
                count,
                context,
                first.wall,
                second.wall,
                first.process,
                second.process,
                first.speedup,
                compared.rounds,
                _distance(outputs["sparse"], outputs["dense"]),
                compared.noise.warnings,
            )
        )
        if report is not None:
            report(found[-1])
    return found


def open_timed(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Opens a model for timing; its threads do not spin while another model is timed.

    Raises:
        ArtifactError: ONNX Runtime cannot open it.
        KernelLibraryError: It has packed weights, and there are no kernels here.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if uses_sparse_linear(path):
        session_options(options)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime raises a family of its own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load the model: {error}",
            where=str(path),
            next_step="the file may be truncated or its .data file missing; export it again",
        ) from error


def run_once(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Returns the outputs by name.

    Raises:
        ArtifactError: ONNX Runtime cannot run it on these inputs.
    """
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))
    except Exception as error:
        shapes = {name: array.shape for name, array in feeds.items()}
        raise ArtifactError(
            f"ONNX Runtime cannot run the model on {shapes}: {error}",
            where=str(path),
            next_step="name other lengths with --tokens, or a dense form with the same inputs",
        ) from error


def make_feeds(session: onnxruntime.InferenceSession, tokens: int) -> tuple[dict[str, Any], int]:
    """Makes inputs of a batch of one; returns them and how many tokens the cache holds.

    Args:
        session: Its inputs are floats (normal), masks (1) or indices (0 or 1).
        tokens: The size of what is neither batch nor cache.
    """
    inputs = session.get_inputs()
    has_cache = any("past" in value.name for value in inputs)
    context = CONTEXT if has_cache and tokens == 1 else 0
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in inputs:
        dynamic = [dim for dim in value.shape if not isinstance(dim, int)]
        shape = [
            _size(dim, tokens, context, is_batch=i == 0 and len(dynamic) > 1)
            for i, dim in enumerate(value.shape)
        ]
        dtype = DTYPES[value.type]
        array: np.ndarray[Any, Any]
        if np.issubdtype(dtype, np.floating):
            array = generator.standard_normal(shape)
        elif "mask" in value.name:
            array = np.ones(shape)
        elif "position" in value.name:
            array = np.broadcast_to(np.arange(context, context + tokens), shape)
        else:
            array = generator.integers(0, 2, shape)
        feeds[value.name] = np.ascontiguousarray(array.astype(dtype))
    return feeds, context


def _size(dim: int | str | None, tokens: int, context: int, *, is_batch: bool) -> int:
    if isinstance(dim, int):
        return dim
    words = re.findall(r"[A-Za-z_]\w*|\d+", dim or "")
    if len(words) > 1:
        return sum(
            _size(int(w) if w.isdigit() else w, tokens, context, is_batch=False) for w in words
        )
    name = dim or ""
    if "batch" in name or (is_batch and "sequence" not in name):
        return 1
    if "total" in name:
        return context + tokens
    return context if "past" in name else tokens


def _distance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    distances = [0.0]
    for name in first.keys() & second.keys():
        a, b = first[name].astype(np.float64), second[name].astype(np.float64)
        if a.shape != b.shape:
            return float("inf")
        distances.append(float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30))
    return max(distances)
