"""What `zeroskip inspect` says of a model, and of an ONNX folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.linear_table import common_name, size, table, without_numbers

if TYPE_CHECKING:
    from zeroskip.ir.program import Program
    from zeroskip.runtime.onnx.stored_linears import StoredLinear

Alike = dict[tuple[object, ...], list["InspectedLinear"]]


@dataclass(frozen=True)
class InspectedLinear:
    """One linear.

    Args:
        name: Of its weight.
        shape: (out, in).
        dtype: Of its weight.
        role: `head`, `router`, `shared` or None.
        stage: The stage that it is in.
        prunable: Whether pruners take it unless told otherwise.
        targets: By target, why it could not run sparse there; None where it could.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    role: str | None
    stage: str
    prunable: bool
    targets: Mapping[str, str | None]


@dataclass(frozen=True)
class Summary:
    """What was seen.

    Args:
        model: Its class.
        parameters: How many numbers it has.
        bytes: That its weights take.
        dtypes: Of its weights: numbers by dtype.
        operators: In the graph.
        inputs: Names.
        outputs: Names.
        stages: What block-scoped passes will run on, each by the containers in it.
        linears: In order of first use.
    """

    model: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    operators: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[str, ...]
    linears: tuple[InspectedLinear, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    def __str__(self) -> str:
        inside = sum(x.shape[0] * x.shape[1] for x in self.linears)
        prunable = [x for x in self.linears if x.prunable]
        share = sum(x.shape[0] * x.shape[1] for x in prunable) / max(self.parameters, 1)
        kinds = ", ".join(self.dtypes)
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {size(self.bytes)} ({kinds})",
            f"{self.operators} operators; {', '.join(self.inputs)} -> {', '.join(self.outputs)}",
            (
                f"{len(self.linears)} linears with {inside:,} weights; pruners take {len(prunable)} "
                f"({share:.0%} of the parameters)"
            ),
            f"{len(self.stages)} {'stage' if len(self.stages) == 1 else 'stages'}: {_stages(self.stages)}",
            "",
            *self._linears(),
            "",
            *self._refusals(),
            (
                "yes: shape and dtype allow it once it is pruned; whether it is faster is measured "
                "by lower-sparse-linear, lower-semi-structured and `zeroskip bench`"
            ),
        ]
        return "\n".join(lines)

    def _linears(self) -> list[str]:
        targets = list(self.linears[0].targets) if self.linears else []
        rows = [
            [
                common_name([x.name for x in same]),
                f"x {len(same)}" if len(same) > 1 else "",
                f"{same[0].shape[0]} x {same[0].shape[1]}",
                same[0].dtype,
                "yes" if same[0].prunable else f"no: {same[0].role}",
                *("no" if same[0].targets[target] else "yes" for target in targets),
            ]
            for same in self._alike().values()
        ]
        return table(["linear", "count", "out x in", "dtype", "pruned", *targets], rows)

    def _refusals(self) -> list[str]:
        """Why targets refuse linears, each reason once."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for x in self.linears:
            for target, reason in x.targets.items():
                if reason is not None:
                    reasons.setdefault((target, reason), []).append(x.name)
        lines = [
            f"not {target}: {reason} ({len(names)} of {len(self.linears)}, the first is {names[0]})"
            for (target, reason), names in reasons.items()
        ]
        return [*lines, ""] if lines else []

    def _alike(self) -> Alike:
        groups: Alike = {}
        for x in self.linears:
            key = (without_numbers(x.name), x.shape, x.dtype, x.role, tuple(x.targets.values()))
            groups.setdefault(key, []).append(x)
        return groups


def summarize(program: Program) -> Summary:
    """Reads a summary off a captured program; no weight is loaded."""
    from zeroskip.ir.facts import Roles
    from zeroskip.ir.linears import find_linears
    from zeroskip.ir.partition import find_stages
    from zeroskip.ir.selection import select_linears
    from zeroskip.runtime.eligibility import TARGETS

    stages = find_stages(program)
    names = [", ".join(stage.modules) or stage.name for stage in stages]
    stage_of = {
        node: name for stage, name in zip(stages, names, strict=True) for node in stage.nodes
    }
    roles = program.fact(Roles)
    prunable = {linear.name for linear in select_linears(program)}
    dtypes: dict[str, int] = {}
    for name in program.weights:
        source = program.weights.source(name)
        kind = str(source.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + _count(source.shape)
    linears = [
        InspectedLinear(
            linear.name,
            linear.shape,
            str(program.weights.source(linear.parameter).dtype).removeprefix("torch."),
            roles.role(linear.name),
            next((stage_of[use.node] for use in linear.uses if use.node in stage_of), ""),
            linear.name in prunable,
            {target: explain(linear, program) for target, explain in TARGETS.items()},
        )
        for linear in find_linears(program)
    ]
    return Summary(
        type(program.model).__name__ if program.model is not None else "program",
        sum(dtypes.values()),
        program.weights.nbytes(),
        dtypes,
        sum(node.op == "call_function" for node in program.graph.nodes),
        tuple(program.inputs),
        tuple(program.outputs),
        tuple(names),
        tuple(linears),
    )


def onnx_json(path: Path, linears: Sequence[StoredLinear]) -> dict[str, Any]:
    """Returns what an ONNX file holds as plain values."""
    return {
        "model": str(path),
        "bytes": _file_bytes(path),
        "packed": sum(x.is_packed for x in linears),
        "linear_bytes": sum(x.bytes for x in linears),
        "dense_bytes": sum(x.dense_bytes for x in linears),
        "linears": [{**asdict(x), "targets": _targets(x)} for x in linears],
    }


def onnx_table(path: Path, linears: Sequence[StoredLinear]) -> str:
    """Returns the same as a table, one line for all linears that are alike."""
    groups: dict[tuple[object, ...], list[StoredLinear]] = {}
    for x in linears:
        kind = (without_numbers(x.name), x.shape, x.is_packed, x.dtype, tuple(_targets(x).items()))
        groups.setdefault(kind, []).append(x)
    rows = []
    for same in groups.values():
        densities = sorted(x.density for x in same)
        low, high = f"{densities[0]:.4f}", f"{densities[-1]:.4f}"
        rows.append(
            [
                common_name([x.name for x in same]),
                f"x {len(same)}" if len(same) > 1 else "",
                f"{same[0].shape[0]} x {same[0].shape[1]}",
                "packed" if same[0].is_packed else "dense",
                same[0].dtype,
                low if low == high else f"{low}-{high}",
                f"{size(sum(x.dense_bytes for x in same))} -> {size(sum(x.bytes for x in same))}",
                "; ".join(f"{target}: {what}" for target, what in _targets(same[0]).items()),
            ]
        )
    head = ["linear", "count", "out x in", "stored", "values", "density", "float32 -> file", "runs"]
    packed = sum(x.is_packed for x in linears)
    dense_bytes, own = sum(x.dense_bytes for x in linears), sum(x.bytes for x in linears)
    lines = [
        f"{path}: {size(_file_bytes(path))}; {packed} of {len(linears)} linears are packed",
        f"linears: {size(dense_bytes)} as float32, {size(own)} here",
        "",
        *table(head, rows),
    ]
    if not packed and any(x.density < 1 for x in linears):
        lines += [
            "",
            "Zeros in dense weights make nothing faster in ONNX Runtime: run `zeroskip tune`.",
        ]
    return "\n".join(lines)


def _targets(linear: StoredLinear) -> dict[str, str]:
    """What each target does with a weight as it is stored."""
    from zeroskip.runtime.eligibility import explain_tensorrt_shape

    if linear.is_packed:
        return {
            "onnxruntime-cpu": "sparse, with zeroskip's kernels",
            "tensorrt 2:4": "no: packed; `zeroskip export --dense` first",
        }
    refusal = explain_tensorrt_shape(linear.shape)
    if refusal is None and not linear.is_24:
        refusal = "its zeros are not 2:4"
    return {
        "onnxruntime-cpu": "dense",
        "tensorrt 2:4": "yes, with --sparsity=enable" if refusal is None else f"no: {refusal}",
    }


def _stages(names: Sequence[str]) -> str:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(name)
    return ", ".join(common_name(same) for same in groups.values())


def _count(shape: Sequence[int]) -> int:
    total = 1
    for dim in shape:
        total *= int(dim)
    return total


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.is_file())
