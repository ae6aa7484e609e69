"""Which parts of a model cost most, in words: for a gate that failed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zeroskip.ir.program import Program
from zeroskip.linear_table import size
from zeroskip.report import LinearReport

SHOWN = 5


def by_error(linears: Sequence[LinearReport]) -> tuple[str, ...]:
    """The pruned linears whose outputs moved most, else whose weights changed most."""
    pruned = [linear for linear in linears if linear.pattern != "dense"]
    errors = [(linear.error, linear.name) for linear in pruned if linear.error is not None]
    words = "output error"
    if not errors:
        errors = [(linear.change, linear.name) for linear in pruned if linear.change is not None]
        words = "change of weights"
    worst = sorted(errors, key=lambda each: (-each[0], each[1]))[:SHOWN]
    return tuple(f"{name}: {words} {100 * error:.1f} %" for error, name in worst)


def by_speed(linears: Sequence[LinearReport], tokens: int) -> tuple[str, ...]:
    """The pruned linears with most weights that run dense, then the sparse ones that gain least."""
    pruned = [linear for linear in linears if linear.pattern != "dense"]
    dense, sparse = [], []
    for linear in pruned:
        weights = linear.shape[0] * linear.shape[1]
        verdict = linear.verdict
        if verdict is None and "sparse_linear" in linear.note:
            sparse.append((math.inf, linear.name, "packed without having been measured"))
            continue
        if verdict is None or verdict["choice"] != "sparse":
            why = linear.note or "not packed" if verdict is None else str(verdict["reason"])
            dense.append((-weights, linear.name, f"runs dense, {why}"))
            continue
        known = {int(m): float(factor) for m, factor in verdict["speedup"].items()}
        if known:
            m = min(known, key=lambda each: abs(each - tokens))
            sparse.append((known[m], linear.name, f"{known[m]:.2f}x at m={m}"))
    if not pruned:
        return ("no linear is pruned",)
    ordered = [*sorted(dense), *sorted(sparse)][:SHOWN]
    return tuple(f"{name}: {text}" for _, name, text in ordered)


def by_bytes(program: Program) -> tuple[str, ...]:
    """The largest weights that the program reads."""
    found = []
    for name in program.read_weights():
        source = program.weights.source(name)
        found.append((-math.prod(source.shape) * source.dtype.itemsize, name))
    return tuple(f"{name}: {size(-count)}" for count, name in sorted(found)[:SHOWN])
