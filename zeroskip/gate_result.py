"""What gates found, in words and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
