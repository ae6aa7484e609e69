"""Gates: whether a result is what its recipe demands, by how much, and which parts cost most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zeroskip import gate_measures
from zeroskip.compile import CompiledModel
from zeroskip.evaluate import encode
from zeroskip.gate_measures import Baseline
from zeroskip.gate_options import Gates
from zeroskip.gate_result import GateResult
from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.passes import ExportOnnx, Pass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zeroskip.ir.program import Program


def prepare_gates(
    gates: Gates,
    passes: Sequence[Pass],
    program: Program,
    tokenizer: PreTrainedTokenizerBase,
    memory: str | int = "4GiB",
) -> Baseline:
    """Checks that every gate can be decided, and measures the dense model.

    Args:
        gates: What will be demanded.
        passes: Of the recipe.
        program: The dense model.
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
    return Baseline(tokens, gate_measures.score(program, tokens, gate, memory))


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
                lambda: gate_measures.measure_perplexity(
                    perplexity_gate, baseline, compiled, memory
                ),
                "max_perplexity_increase",
                perplexity_gate.ratio,
            )
        )
    if (speed_gate := gates.min_speedup) is not None and onnx is not None:
        results.append(
            _attempt(
                lambda: gate_measures.measure_speedup(speed_gate, compiled, onnx, folder),
                "min_speedup",
                speed_gate.factor,
            )
        )
    if gates.max_bytes is not None:
        results.append(
            gate_measures.measure_bytes(
                gates.max_bytes.bytes, compiled, onnx or folder / "checkpoint"
            )
        )
    if gates.parity is not None and onnx is not None:
        results.append(gate_measures.read_parity(gates.parity.limit, onnx))
    return results


def _attempt(measure: Callable[[], GateResult], name: str, limit: float) -> GateResult:
    """Measures a gate; what cannot be measured has failed, and the result is kept all the same."""
    try:
        return measure()
    except CompileError as error:
        detail = f"cannot be measured: {' '.join(str(error).split())}"
        return GateResult(name, limit, None, "", False, detail)


def _export(passes: Sequence[Pass]) -> ExportOnnx | None:
    """The last export of a recipe: what is deployed."""
    return next((step for step in reversed(passes) if isinstance(step, ExportOnnx)), None)
