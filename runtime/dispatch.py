"""Decides for one linear whether it runs sparse: only where that was measured not to be slower.

Where nothing was measured, a table of the lowest speed-ups seen on machines with the same
instruction set decides, and where that knows nothing the linear stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from zeroskip.ir.errors import KernelLibraryError, LoweringError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.rivals import ONNX_RUNTIME, Rival
from zeroskip.runtime.speed_table import load_table
from zeroskip.runtime.tuning import UNUSABLE, Measured, Tuner, round_density, type_name

Choice = Literal["sparse", "dense"]
Source = Literal["measured", "table"]

LEAST = 0.97
"""Below this speed-up at any m asked, a linear stays dense: within it is measuring noise."""
STANDARD_ERRORS = 3
"""A speed-up that is 1 or less when so many are taken off is in doubt, and measured twice."""
WORTH_MEMORY = 1.03
"""A layout that takes more memory must be this much better."""

NODE_SECONDS = 4e-6
"""What a node of a custom operator may cost ONNX Runtime beyond a MatMul, for the table."""
FAST_BYTES = 50e9
FAST_OPERATIONS = 150e9
"""Bytes and operations in a second that a dense product hardly exceeds on one core."""


@dataclass(frozen=True)
class Verdict:
    """What was decided about one linear, and why.

    Args:
        rows: out_features.
        columns: in_features.
        density: Share of kept weights.
        value_type: Of the kept values: "float32", "float16", "bfloat16" or "int8".
        accuracy_level: 4 where activations are rounded to 8 bits, else 0.
        dense_bytes: Size of the dense weight: float32 in ONNX Runtime, the model's dtype in PyTorch.
        packed_bytes: Size of the packed tensors.
        layout: 0 as stored, 1 repacked for throughput.
        speedup: m to dense time / sparse time of that layout; empty where nothing is known.
        choice: "sparse" or "dense".
        reason: Why, in one sentence.
        source: "measured" on this machine, or from the "table".
        threads: Threads it was measured with.
        extra_bytes: Memory that the layout takes besides the packed tensors, where measured.
        noise: The largest standard error of the speed-ups, relative, where measured.
        rival: Whose dense product the speed-ups refer to: "ONNX Runtime" or "PyTorch".
    """

    rows: int
    columns: int
    density: float
    value_type: str
    accuracy_level: int
    dense_bytes: int
    packed_bytes: int
    layout: int
    speedup: Mapping[int, float]
    choice: Choice
    reason: str
    source: Source
    threads: int = 1
    extra_bytes: int = 0
    noise: float = 0.0
    rival: str = "ONNX Runtime"

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {**asdict(self), "speedup": {str(m): s for m, s in self.speedup.items()}}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Verdict:
        """Returns what `to_json` wrote."""
        return Verdict(**{**stored, "speedup": {int(m): s for m, s in stored["speedup"].items()}})


@dataclass(frozen=True)
class Candidate:
    """One layout before the decision.

    Args:
        speedup: m to dense time / sparse time.
        extra_bytes: Memory that it takes besides the packed tensors.
    """

    speedup: Mapping[int, float]
    extra_bytes: int = 0

    @property
    def mean(self) -> float:
        """The geometric mean over m."""
        return math.exp(sum(math.log(s) for s in self.speedup.values()) / len(self.speedup))

    def objection(self) -> str | None:
        """Returns why this layout does not beat dense, or None."""
        if min(self.speedup.values()) < LEAST:
            return _least(self.speedup)
        if self.mean <= 1:
            return f"{self.mean:.2f}x on average over m={_listed(self.speedup)}"
        return None


@dataclass(frozen=True)
class Decision:
    """Which layout of some runs, if any does; `layout` is the best one even where dense wins."""

    choice: Choice
    layout: int
    reason: str


def decide(candidates: Mapping[int, Candidate]) -> Decision:
    """Chooses among the layouts of one linear and dense.

    A layout qualifies when its speed-up is at least 0.97 at every m and above 1 on geometric
    average. The best average wins, but more memory must bring more than 3 % over less memory.

    Args:
        candidates: Layout to what is known about it; not empty.
    """
    fit = [layout for layout, each in candidates.items() if each.objection() is None]
    if not fit:
        best = max(candidates, key=lambda layout: candidates[layout].mean)
        return Decision("dense", best, str(candidates[best].objection()))
    by_memory = sorted(fit, key=lambda layout: candidates[layout].extra_bytes)
    chosen = by_memory[0]
    for layout in by_memory[1:]:
        more = candidates[layout].extra_bytes > candidates[chosen].extra_bytes
        worth = candidates[chosen].mean * (WORTH_MEMORY if more else 1)
        if candidates[layout].mean > worth:
            chosen = layout
    found = candidates[chosen]
    over = f" on average over m={_listed(found.speedup)}" if len(found.speedup) > 1 else ""
    at = "" if over else f" at m={_listed(found.speedup)}"
    return Decision("sparse", chosen, f"{found.mean:.2f}x{over}{at}")


def new_tuner() -> Tuner | None:
    """Returns what measures, for several calls of `judge`; None when there are no kernels."""
    try:
        return Tuner()
    except KernelLibraryError:
        return None


def judge(
    weight: BitmaskWeight,
    *,
    m_values: Sequence[int],
    threads: int = 1,
    accuracy_level: int = 0,
    layouts: Sequence[int] = (0, 1),
    source: Literal["table", "measure"] = "table",
    working_set_bytes: int | None = None,
    tuner: Tuner | None = None,
    rival: Rival = ONNX_RUNTIME,
) -> Verdict:
    """Decides whether a linear runs sparse.

    Args:
        weight: Packed as it would run.
        m_values: Rows of x that matter: 1 for decoding, the prompt's tokens for prefill.
        threads: Threads of the session.
        accuracy_level: 4 rounds activations to 8 bits; other values than int8 ignore it.
        layouts: Those that may be used.
        source: "measure" times it here, unless that was done before; "table" times nothing: where
            it was not measured before, the table of the package decides. The table is of ONNX
            Runtime: against PyTorch, what was not measured stays dense.
        working_set_bytes: Size of all linears of the model in the rival's dtype: it says how far
            caches help. None for this linear alone.
        tuner: What measures, shared among calls; by default a new one.
        rival: What it must not be slower than.

    Raises:
        LoweringError: There is no m, an m below 1, or no layout.
    """
    if not m_values or min(m_values) < 1 or not layouts:
        raise LoweringError(
            f"a linear cannot be judged at m={list(m_values)} with layouts {list(layouts)}",
            next_step="name at least one layout, and at least one m of 1 or more",
        )
    level = accuracy_level if type_name(weight) == "int8" else 0
    elements = weight.rows * weight.columns
    plain = Verdict(
        rows=weight.rows,
        columns=weight.columns,
        density=weight.kept / elements if elements else 0.0,
        value_type=type_name(weight),
        accuracy_level=level,
        dense_bytes=elements * rival.dtype.itemsize,
        packed_bytes=weight.nbytes,
        layout=0,
        speedup={},
        choice="dense",
        reason="the weight is empty",
        source="measured" if source == "measure" else "table",
        threads=threads,
        rival=rival.name,
    )
    if not elements:
        return plain
    try:
        tuner = Tuner() if tuner is None else tuner
    except KernelLibraryError as error:
        return replace(plain, reason=f"there are no kernels: {error.problem}")
    measure = partial(
        tuner.measure,
        weight,
        m_values=tuple(dict.fromkeys(m_values)),
        threads=threads,
        accuracy_level=level,
        working_set_bytes=working_set_bytes,
        rival=rival,
    )
    seen = measure(layouts=layouts, only_known=source == "table")
    if source == "table" and not seen and not rival.is_eager:
        return _judge_by_table(plain, weight, m_values, layouts, tuner.instruction_sets[0])
    if source == "table" and not seen:
        return replace(plain, reason=f"it was never measured against {rival.name} on this machine")
    plain = replace(plain, source="measured")
    if not seen:
        return replace(plain, reason="no kernel serves this weight")
    return _judge_by_measurements(plain, seen, measure if source == "measure" else None)


def _judge_by_measurements(
    plain: Verdict,
    seen: Mapping[int, Measured],
    measure: Callable[..., Mapping[int, Measured]] | None,
) -> Verdict:
    """Decides; what is chosen by a hair is measured a second time, and the slower result counts.

    Args:
        plain: The verdict without a decision.
        seen: Layout to what was measured.
        measure: Measures again; None where nothing may be timed.
    """
    settled: set[int] = set()
    while True:
        decision = decide({k: Candidate(v.speedup, v.extra_bytes) for k, v in seen.items()})
        best = seen[decision.layout]
        if decision.choice == "dense" or not _is_doubtful(best):
            break
        if decision.layout in settled or best.times > 1:
            if best.noise > UNUSABLE:
                reason = f"{_least(best.speedup)}, and too noisy to tell: measure again on an idle machine"
                decision = Decision("dense", decision.layout, reason)
            break
        if measure is None:
            reason = f"{_least(best.speedup)}, in doubt: it was measured only once"
            decision = Decision("dense", decision.layout, reason)
            break
        settled.add(decision.layout)
        seen = {**seen, **measure(layouts=[decision.layout], again=True)}
    return _decided(plain, decision, best.speedup, best.extra_bytes, best.noise)


def _is_doubtful(measured: Measured) -> bool:
    """Whether it may be slower than dense, as far as noise tells."""
    lowest = min(measured.speedup.values())
    return lowest * (1 - STANDARD_ERRORS * measured.noise) < 1


def _least(speedup: Mapping[int, float]) -> str:
    m = min(speedup, key=lambda each: speedup[each])
    return f"{speedup[m]:.2f}x at m={m}"


def _judge_by_table(
    plain: Verdict,
    weight: BitmaskWeight,
    m_values: Sequence[int],
    layouts: Sequence[int],
    instruction_set: str,
) -> Verdict:
    table = load_table()
    candidates = {}
    for layout in layouts:
        speedup = table.speedups(
            instruction_set,
            plain.value_type,
            plain.accuracy_level,
            layout,
            round_density(weight),
            m_values,
        )
        if speedup is not None:
            # How much a layout takes is not known here, only that another than 0 takes some.
            elements = plain.rows * plain.columns
            expected = {m: _of_a_node(each, elements, m) for m, each in speedup.items()}
            candidates[layout] = Candidate(expected, extra_bytes=layout)
    if not candidates:
        kind = f"{plain.value_type} values at density {plain.density:.2f} with {instruction_set}"
        return replace(plain, reason=f"the table knows no {kind}; `zeroskip tune` measures it")
    decision = decide(candidates)
    return _decided(plain, decision, candidates[decision.layout].speedup, 0, 0.0)


def _of_a_node(speedup: float, elements: int, m: int) -> float:
    """What is left of the table's speed-up, which is of large linears, where calls cost something.

    The dense product is taken to be as fast as any: the sooner it is done, the more a call matters.
    """
    dense = max(4 * elements / FAST_BYTES, 2 * m * elements / FAST_OPERATIONS)
    return dense / (dense / speedup + NODE_SECONDS)


def _decided(
    plain: Verdict,
    decision: Decision,
    speedup: Mapping[int, float],
    extra_bytes: int,
    noise: float,
) -> Verdict:
    sparse = decision.choice == "sparse"
    return replace(
        plain,
        layout=decision.layout if sparse else 0,
        speedup=dict(speedup),
        choice=decision.choice,
        reason=decision.reason,
        extra_bytes=extra_bytes if sparse else 0,
        noise=noise,
    )


def _listed(m_values: Mapping[int, float]) -> str:
    return ", ".join(str(m) for m in m_values)
