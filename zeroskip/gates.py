"""Gates: whether a result is what its recipe demands, by how much, and which parts cost most."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.compile import CompiledModel, open_program
from zeroskip.evaluate import Perplexity, encode, perplexity
from zeroskip.gate_costs import by_bytes, by_error, by_speed
from zeroskip.gate_options import Gates, PerplexityGate, SpeedupGate
from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.program import Program
from zeroskip.ir.streams import parse_bytes
from zeroskip.linear_table import size
from zeroskip.passes import ExportOnnx, Pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PARITY_FILE = "zeroskip_parity.json"
MODEL_FILE = "model.onnx"
TIMED = frozenset({"min_speedup"})
"""Gates whose result is another in each run."""


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Args:
        name: Of the gate.
        limit: What was demanded, in `unit`.
        measured: What is; None where it cannot be measured.
        unit: Of both.
        passed: Whether that is enough.
        detail: How it was measured, in a sentence.
        conditions: The same as data: all that is needed to measure it again.
        costliest: Where it failed, the parts that cost most, as `what: how much`.
    """

    name: str
    limit: float
    measured: float | None
    unit: str
    passed: bool
    detail: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    costliest: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        known = {"dense_perplexity", "perplexity"}
        shown = {name: value for name, value in self.conditions.items() if name in known}
        return {**asdict(self), "costliest": list(self.costliest), **shown}

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.detail}"]
        if self.costliest:
            lines.append(f"    costs most: {'; '.join(self.costliest)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Baseline:
    """What gates compare with: made before the compilation, so that what cannot be is refused then.

    Args:
        tokens: Of the text to score; None where no gate needs it.
        dense: How well the dense model predicts it.
    """

    tokens: torch.Tensor | None = None
    dense: Perplexity | None = None


def prepare_gates(
    gates: Gates,
    passes: Sequence[Pass],
    source: torch.nn.Module | Path,
    tokenizer: PreTrainedTokenizerBase,
    memory: str | int = "4GiB",
) -> Baseline:
    """Checks that every gate can be decided, and measures the dense model.

    Args:
        gates: What will be demanded.
        passes: Of the recipe.
        source: The dense model.
        tokenizer: Its tokenizer.
        memory: A model whose weights take more is read anew for each window.

    Raises:
        RecipeError: A gate needs an export, or a text, that the recipe does not have.
        EvaluationError: The text cannot be scored by this model.
    """
    check_decidable(gates, passes)
    gate = gates.max_perplexity_increase
    if gate is None or gate.text is None:
        return Baseline()
    tokens = encode(Path(gate.text), tokenizer, gate.max_tokens)
    return Baseline(tokens, _score(open_program(source), tokens, gate, memory))


def check_decidable(gates: Gates, passes: Sequence[Pass]) -> None:
    """Raises RecipeError when a gate needs an export, or a text, that the recipe does not have."""
    for name in ("min_speedup", "parity"):
        if getattr(gates, name) is not None and _export(passes) is None:
            raise RecipeError(
                f"the gate `{name}` measures an ONNX model, and the recipe exports none.",
                where=f"gates, {name}",
                next_step="add the pass `export-onnx: {directory: onnx}`, or leave the gate out",
            )
    gate = gates.max_perplexity_increase
    if gate is not None and gate.text is None:
        raise RecipeError(
            "the gate `max_perplexity_increase` has no text to measure on.",
            where="gates, max_perplexity_increase",
            next_step="add `text: FILE` to it, or give --evaluation FILE",
        )


def check_gates(
    gates: Gates,
    baseline: Baseline,
    compiled: CompiledModel,
    passes: Sequence[Pass],
    folder: Path,
    memory: str | int = "4GiB",
) -> list[GateResult]:
    """Measures everything that is demanded; a gate that fails does not keep others from it.

    Args:
        gates: What is demanded.
        baseline: What `prepare_gates` returned.
        compiled: The result.
        passes: That made it, their directories as they were written.
        folder: The artefact, complete but for what is said about it.
        memory: See `prepare_gates`.
    """
    export = _export(passes)
    onnx = None if export is None else folder / export.directory
    results = []
    if (perplexity_gate := gates.max_perplexity_increase) is not None:
        results.append(
            _attempt(
                lambda: _perplexity(perplexity_gate, baseline, compiled, memory),
                "max_perplexity_increase",
                perplexity_gate.ratio,
            )
        )
    if (speed_gate := gates.min_speedup) is not None and onnx is not None:
        results.append(
            _attempt(
                lambda: _speedup(speed_gate, compiled, onnx, folder),
                "min_speedup",
                speed_gate.factor,
            )
        )
    if gates.max_bytes is not None:
        results.append(_bytes(gates.max_bytes.bytes, compiled, onnx or folder / "checkpoint"))
    if gates.parity is not None and onnx is not None:
        results.append(_parity(gates.parity.limit, onnx))
    return results


def _attempt(measure: Callable[[], GateResult], name: str, limit: float) -> GateResult:
    """Measures a gate; what cannot be measured has failed, and the result is kept all the same."""
    try:
        return measure()
    except CompileError as error:
        detail = f"cannot be measured: {' '.join(str(error).split())}"
        return GateResult(name, limit, None, "", False, detail)


def lasting(results: Sequence[GateResult]) -> dict[str, Any]:
    """Returns what is the same in each run with the same inputs and seed, by the name of the gate."""
    found = {}
    for result in results:
        plain = {"limit": result.limit, "unit": result.unit, "passed": result.passed}
        if result.name not in TIMED:
            plain["measured"] = result.measured
        found[result.name] = plain
    return found


def describe_failures(results: Sequence[GateResult]) -> str:
    """Returns every failed gate in words, with what cost most."""
    failed = [result for result in results if not result.passed]
    count = f"{len(failed)} of {len(results)} gates" if len(results) > 1 else "the gate"
    return "\n".join([f"{count} failed", *(f"  {result}" for result in failed)])


@dataclass(frozen=True)
class _Runner:
    """A program as something that can be scored."""

    program: Program

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.program.run({name: inputs[name] for name in self.program.inputs})


def _score(
    program: Program, tokens: torch.Tensor, gate: PerplexityGate, memory: str | int
) -> Perplexity:
    sources = [program.weights.source(name) for name in program.read_weights()]
    needed = sum(math.prod(source.shape) * source.dtype.itemsize for source in sources)
    if needed <= parse_bytes(memory):
        program = program.loaded()
    return perplexity(_Runner(program), tokens, sequence_length=gate.sequence_length)


def _perplexity(
    gate: PerplexityGate, baseline: Baseline, compiled: CompiledModel, memory: str | int
) -> GateResult:
    assert baseline.tokens is not None
    assert baseline.dense is not None
    found = _score(compiled.program, baseline.tokens, gate, memory)
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


def _speedup(gate: SpeedupGate, compiled: CompiledModel, onnx: Path, folder: Path) -> GateResult:
    import shutil
    import tempfile

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


def _bytes(limit: int, compiled: CompiledModel, deployed: Path) -> GateResult:
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


def _parity(limit: float, onnx: Path) -> GateResult:
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


def _export(passes: Sequence[Pass]) -> ExportOnnx | None:
    """The last export of a recipe: what is deployed."""
    return next((step for step in reversed(passes) if isinstance(step, ExportOnnx)), None)
