"""Measures sparsities of an elastic artefact and keeps the results in its manifest."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeroskip.compile import CompiledModel, materialize
from zeroskip.elastic import open_elastic
from zeroskip.elastic_curve import bytes_at
from zeroskip.elastic_manifest import CHECKPOINT, CurvePoint, Manifest, write_manifest
from zeroskip.evaluate import encode, perplexity
from zeroskip.ir.program import Program
from zeroskip.models import load_tokenizer
from zeroskip.passes import ExportOnnx, LowerSparseLinear

CONTEXT = 32
"""Tokens in the cache when a step of decoding is timed."""
_WARM_UP = 3
_LEAST_CALLS = 20
_LEAST_SECONDS = 2.0
Report = Callable[[CurvePoint], None]


def record_curve(
    directory: str | Path,
    text: str | Path | None = None,
    *,
    sparsities: Sequence[float] = (),
    latency: bool = False,
    sequence_length: int = 1024,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Manifest:
    """Measures every point of an artefact's curve and writes the results into elastic.json.

    With a text, the perplexity of every point is measured anew, so that all are of one text.
    Latency is that of one token decoded by ONNX Runtime after `CONTEXT` others (of one run on the
    example inputs where the model has no cache), a median; linears are packed where that pays. It
    holds for this machine alone. Nothing is written before everything was measured.

    Args:
        directory: An artefact.
        text: A UTF-8 file, or a text.
        sparsities: Further points.
        latency: Whether to measure it.
        sequence_length: Inputs in a window of the perplexity.
        max_tokens: Score at most so many.
        threads: Of ONNX Runtime.

    Raises:
        ArtifactError: The directory is no sound artefact, or cannot be written.
        PatternError: A sparsity was not trained.
        EvaluationError: The text cannot be scored.
    """
    directory = Path(directory)
    program, manifest = open_elastic(directory)
    tokens = None if text is None else read_tokens(directory, text, max_tokens)
    manifest = measure_curve(
        program,
        manifest,
        tokens,
        sparsities=sparsities,
        latency=latency,
        sequence_length=sequence_length,
        threads=threads,
    )
    write_manifest(manifest, directory)
    return manifest


def read_tokens(directory: Path, text: str | Path, max_tokens: int | None = None) -> torch.Tensor:
    """Returns the tokens of a text by the tokenizer of an artefact."""
    return encode(text, load_tokenizer(directory / CHECKPOINT), max_tokens)


def measure_curve(
    program: Program,
    manifest: Manifest,
    tokens: torch.Tensor | None,
    *,
    sparsities: Sequence[float] = (),
    latency: bool = False,
    sequence_length: int = 1024,
    threads: int | None = None,
    report: Report | None = None,
) -> Manifest:
    """Returns a manifest with the points that were measured; see `record_curve`.

    Args:
        program: Of an artefact.
        manifest: Of the same.
        tokens: Of the text; None measures no perplexity.
        sparsities: Further points.
        latency: Whether to measure it.
        sequence_length: Inputs in a window of the perplexity.
        threads: Of ONNX Runtime.
        report: Called with every finished point.
    """
    known = {point.sparsity: point for point in manifest.curve}
    for sparsity in sparsities:
        known.setdefault(sparsity, CurvePoint(sparsity, bytes_at(program, sparsity)))
    measured, points = dict(manifest.measured), []
    for point in sorted(known.values(), key=lambda p: p.sparsity):
        if tokens is not None:
            made = materialize(program, point.sparsity)
            result = perplexity(made, tokens, sequence_length=sequence_length)
            point = replace(point, perplexity=result.perplexity)
            measured["perplexity"] = {
                "tokens": result.tokens,
                "sequence_length": result.sequence_length,
                "stride": result.stride,
                "token_ids_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            }
        if latency:
            seconds, conditions = measure_latency(program, point.sparsity, threads)
            point = replace(point, latency=1000 * seconds)
            measured["latency"] = conditions
        points.append(point)
        if report is not None:
            report(point)
    return manifest.with_curve(points, measured)


def measure_latency(
    program: Program, sparsity: float, threads: int | None = None
) -> tuple[float, dict[str, Any]]:
    """Returns the median seconds of one decoded token at a sparsity, and how it was measured.

    Args:
        program: Knows `Elastic`.
        sparsity: Share of weights to prune.
        threads: Of ONNX Runtime; every core by default.
    """
    from zeroskip.runtime.machine import available_cores, cpu_name
    from zeroskip.runtime.onnx.session import OnnxModel

    threads = threads or available_cores()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "onnx"
        compiled = materialize(program, sparsity, [*packing(threads=threads), ExportOnnx(path)])
        model = OnnxModel(path, threads=threads)
        times = _timed(model, compiled)
        del model  # Windows removes no open file.
    conditions = {
        "machine": cpu_name(),
        "threads": threads,
        "tokens_before": CONTEXT,
        "runtime": "onnxruntime, zeroskip kernels where they pay",
    }
    return statistics.median(times), conditions


def packing(*, always: bool = False, threads: int = 0) -> list[LowerSparseLinear]:
    """Returns the passes that pack pruned linears for ONNX Runtime.

    Args:
        always: Pack all of them: for size. Otherwise those where it pays in time.
        threads: That the model will run with; 0 for as many as PyTorch uses.
    """
    return [LowerSparseLinear(choose="always" if always else "auto", threads=threads)]


def _timed(model: Any, compiled: CompiledModel) -> list[float]:
    if model.has_cache:
        prompt = torch.arange(CONTEXT)[None] % 2
        past = model.logits(prompt).past
        token = torch.zeros(1, 1, dtype=torch.int64)

        def run() -> None:
            model.logits(token, past=past)

    else:
        inputs = dict(compiled.program.example_inputs)

        def run() -> None:
            model.run(inputs)

    for _ in range(_WARM_UP):
        run()
    times: list[float] = []
    while len(times) < _LEAST_CALLS or sum(times) < _LEAST_SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
