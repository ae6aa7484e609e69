"""How each gate is measured."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeroskip.compile import CompiledModel
from zeroskip.evaluate import Perplexity, perplexity
from zeroskip.gate_costs import by_bytes, by_error, by_speed
from zeroskip.gate_options import PerplexityGate, SpeedupGate
from zeroskip.gate_result import GateResult
from zeroskip.ir.program import Program
from zeroskip.ir.streams import parse_bytes
from zeroskip.linear_table import size

PARITY_FILE = "zeroskip_parity.json"
MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class Baseline:
    """What gates compare with: made before the compilation, so that what cannot be is refused then.

    Args:
        tokens: Of the text to score; None where no gate needs it.
        dense: How well the dense model predicts it.
    """

    tokens: torch.Tensor | None = None
    dense: Perplexity | None = None


@dataclass(frozen=True)
class _Runner:
    """A program as something that can be scored."""

    program: Program

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.program.run({name: inputs[name] for name in self.program.inputs})


def score(
    program: Program, tokens: torch.Tensor, gate: PerplexityGate, memory: str | int
) -> Perplexity:
    """Returns how well a program predicts tokens."""
    sources = [program.weights.source(name) for name in program.read_weights()]
    needed = sum(math.prod(source.shape) * source.dtype.itemsize for source in sources)
    if needed <= parse_bytes(memory):
        program = program.loaded()
    return perplexity(_Runner(program), tokens, sequence_length=gate.sequence_length)


def measure_perplexity(
    gate: PerplexityGate, baseline: Baseline, compiled: CompiledModel, memory: str | int
) -> GateResult:
    """Scores the compiled program on the tokens that the dense one was scored on."""
    assert baseline.tokens is not None
    assert baseline.dense is not None
    found = score(compiled.program, baseline.tokens, gate, memory)
    before, after = baseline.dense.perplexity, found.perplexity
    ratio = after / before
    passed = ratio <= gate.ratio
    return GateResult(
        "max_perplexity_increase",
        gate.ratio,
        ratio if math.isfinite(ratio) else None,
        "times the perplexity of the dense model",
        passed,
        f"perplexity {after:.4f}, dense {before:.4f}: {_percent(ratio)}, at most "
        f"{_percent(gate.ratio)} is allowed; {found.tokens} tokens in windows of "
        f"{found.sequence_length}",
        {
            "dense_perplexity": before,
            "perplexity": after,
            "text": Path(str(gate.text)).name,
            "tokens": found.tokens,
            "sequence_length": found.sequence_length,
            "stride": found.stride,
        },
        () if passed else by_error(compiled.report.linears),
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.4g} %"


def measure_speedup(
    gate: SpeedupGate, compiled: CompiledModel, onnx: Path, folder: Path
) -> GateResult:
    """Times the exported model against its dense float32 form."""
    from zeroskip.runtime.machine import available_cores, cpu_name
    from zeroskip.runtime.onnx.densify import densify
    from zeroskip.runtime.onnx.paired_speed import compare_speed

    threads = gate.threads or available_cores()
    # In the unfinished artefact: on the disk that has room, and gone with it if this is killed.
    dense = Path(tempfile.mkdtemp(prefix=".dense-", dir=folder))
    try:
        packed = densify(onnx / MODEL_FILE, dense / MODEL_FILE)
        speeds = compare_speed(
            onnx / MODEL_FILE,
            dense / MODEL_FILE,
            gate.tokens,
            threads=threads,
            rounds=gate.rounds,
        )
    finally:
        shutil.rmtree(dense, ignore_errors=True)
    slowest = min(speeds, key=lambda speed: speed.speedup.median)
    measured = slowest.speedup.median
    passed = measured >= gate.factor
    each = ", ".join(f"{speed.speedup.median:.2f}x at {speed.tokens}" for speed in speeds)
    noise = sorted({warning for speed in speeds for warning in speed.warnings})
    return GateResult(
        "min_speedup",
        gate.factor,
        measured,
        "times as fast as dense float32 in ONNX Runtime",
        passed,
        f"{each} tokens, at least {gate.factor:g}x is demanded; medians of paired runs, "
        f"{threads} threads, {cpu_name()}, {packed} linears packed"
        + (f"; noisy: {', '.join(noise)}" if noise else ""),
        {
            "speedup": {str(speed.tokens): speed.speedup.median for speed in speeds},
            "quartiles": {
                str(speed.tokens): [speed.speedup.low, speed.speedup.high] for speed in speeds
            },
            "rounds": {str(speed.tokens): speed.rounds for speed in speeds},
            "threads": threads,
            "machine": cpu_name(),
            "packed_linears": packed,
            "noise": noise,
        },
        () if passed else by_speed(compiled.report.linears, slowest.tokens),
    )


def measure_bytes(limit: int, compiled: CompiledModel, deployed: Path) -> GateResult:
    """Counts every file of a folder but the records of zeroskip."""
    files = {
        file.relative_to(deployed).as_posix(): file.stat().st_size
        for file in sorted(deployed.rglob("*"))
        if file.is_file() and not file.name.startswith("zeroskip_")
    }
    total = sum(files.values())
    passed = total <= limit
    return GateResult(
        "max_bytes",
        limit,
        total,
        "bytes",
        passed,
        f"{size(total)} ({total:,} bytes) in {len(files)} files of {deployed.name}/, at most "
        f"{size(limit)} ({limit:,} bytes) is allowed",
        {"folder": deployed.name, "files": files},
        () if passed else by_bytes(compiled.program),
    )


def read_parity(limit: float, onnx: Path) -> GateResult:
    """Looks up how far the exported model was from the program."""
    found = json.loads((onnx / PARITY_FILE).read_text(encoding="utf-8"))
    worst = max(found["cases"], key=lambda case: max(case["distances"].values()))
    passed = bool(found["worst"] <= limit)
    return GateResult(
        "parity",
        limit,
        found["worst"],
        "relative distance of the outputs",
        passed,
        f"the ONNX model is {found['worst']:.2e} from the compiled program at {worst['case']}, at "
        f"most {limit:.2e} is allowed",
        {"cases": len(found["cases"]), "export_limit": found["limit"]},
        () if passed else _worst_cases(found["cases"]),
    )


def _worst_cases(cases: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def distance(case: Mapping[str, Any]) -> float:
        return float(max(case["distances"].values()))

    worst = sorted(cases, key=distance, reverse=True)[:3]
    return tuple(f"{case['case']}: {distance(case):.2e}" for case in worst)
