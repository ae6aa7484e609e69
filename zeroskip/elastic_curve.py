"""What the sparsities of an elastic artefact are worth, and which of them a budget allows.

Only sparsities that were recorded are chosen; nothing is interpolated between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroskip.elastic_manifest import CurvePoint
from zeroskip.ir.elastic import LEVELS, Elastic
from zeroskip.ir.elastic_training import thresholds_of
from zeroskip.ir.errors import CompileError
from zeroskip.ir.formats import PADDING, WORD
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.patterns import NM, pruned_count
from zeroskip.ir.program import Program

_PACKED = (torch.float32, torch.float16, torch.bfloat16)


def edge_curve(program: Program) -> tuple[CurvePoint, ...]:
    """Returns points at 0 and at the highest sparsity of each group, with nothing but bytes.

    Args:
        program: Dense, and knows `Elastic`.
    """
    return tuple(CurvePoint(p, bytes_at(program, p)) for p in edges_of(program.fact(Elastic)))


def edges_of(elastic: Elastic) -> list[float]:
    """Returns 0 and the highest sparsity of each group: its edge, or the pattern below it."""
    if not elastic.group_of_weights:
        return [0.0, *elastic.groups]
    highest = [max(thresholds_of(elastic, k), default=0) for k in range(len(elastic.groups))]
    return sorted({0.0, *(threshold / LEVELS for threshold in highest)})


def bytes_at(program: Program, sparsity: float) -> int:
    """Returns the bytes of all weights at a sparsity, counted, not made.

    Pruned linears are taken as bitmask, row offsets and kept values in the dtype of their weight,
    as `lower-sparse-linear` packs them. Experts and other dtypes, which it does not take, and all
    other parameters are dense.

    Args:
        program: Dense, and knows `Elastic`.
        sparsity: Share of weights to prune.

    Raises:
        PatternError: No such mask.
    """
    elastic, weights = program.fact(Elastic), program.weights
    elastic.group(sparsity)
    total = weights.nbytes()
    if not sparsity:
        return total
    for parameter, linear in {n.parameter: n for n in find_linears(program)}.items():
        dtype = weights.source(parameter).dtype
        if linear.name in elastic.linears and linear.expert is None and dtype in _PACKED:
            total += _packed_bytes(linear, elastic, sparsity, dtype.itemsize)
            total -= linear.out_features * linear.in_features * dtype.itemsize
    return total


def _packed_bytes(linear: Linear, elastic: Elastic, sparsity: float, itemsize: int) -> int:
    rows, width, pattern = linear.out_features, linear.in_features, elastic.pattern(sparsity)
    if isinstance(pattern, NM):
        kept = width // pattern.m * pattern.n
    else:
        kept = width - pruned_count(sparsity, width)
    bitmask = rows * (WORD // 8) * -(-width // WORD)
    return bitmask + 8 * (rows + 1) + itemsize * (rows * kept + PADDING)


def choose_point(
    curve: Sequence[CurvePoint],
    *,
    max_perplexity: float | None = None,
    max_bytes: int | None = None,
    target_latency: float | None = None,
) -> CurvePoint:
    """Returns the recorded point that a budget asks for; exactly one budget is given.

    Args:
        curve: What was recorded, rising in sparsity.
        max_perplexity: Take the highest sparsity whose perplexity is no more.
        max_bytes: Take the lowest sparsity whose weights are no larger.
        target_latency: Take the lowest sparsity that is no slower, in milliseconds.

    Raises:
        CompileError: None or several budgets, one that is no positive number, nothing of the kind
            was recorded, or no point meets it; then the nearest one is named.
    """
    budgets = {"perplexity": max_perplexity, "bytes": max_bytes, "latency": target_latency}
    given = {kind: limit for kind, limit in budgets.items() if limit is not None}
    if len(given) != 1:
        raise CompileError(
            f"{len(given)} budgets are given",
            next_step="give one of --max-perplexity, --max-bytes, --target-latency",
        )
    kind, limit = next(iter(given.items()))
    if not 0 < limit < float("inf"):
        raise CompileError(f"a {kind} of {limit} is no budget", next_step="give a positive number")
    known = [(p, value) for p in curve if (value := getattr(p, kind)) is not None]
    if not known:
        option = "--text FILE" if kind == "perplexity" else "--latency"
        raise CompileError(
            f"the artefact has no {kind} of any sparsity",
            next_step=f"measure it with `zeroskip curve ARTEFACT {option}`, or give --sparsity",
        )
    fitting = [point for point, value in known if value <= limit]
    if not fitting:
        nearest, value = min(known, key=lambda pair: pair[1])
        raise CompileError(
            f"no recorded sparsity has {_shown(kind, limit)} or less",
            next_step=f"the nearest is {_shown(kind, value)} at sparsity {nearest.sparsity:g}; "
            "record other sparsities with `zeroskip curve`, or train for them",
        )
    return fitting[-1] if kind == "perplexity" else fitting[0]


def _shown(kind: str, value: float) -> str:
    if kind == "bytes":
        return f"{value:,.0f} bytes"
    return f"perplexity {value:.4f}" if kind == "perplexity" else f"{value:.3f} ms"
