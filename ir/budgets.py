"""How much of each linear is to be pruned, where that is not the same for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program


@dataclass(frozen=True)
class Budgets(Fact):
    """How much of each linear is to be pruned; pruners with an unstructured pattern obey it.

    Args:
        sparsities: By linear, in [0, 1). Linears that are not in it get the pruner's own.
    """

    sparsities: Mapping[str, float] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        known = {linear.name for linear in find_linears(program)}
        for name, sparsity in self.sparsities.items():
            if name not in known:
                return f"a budget for {name}, which is not a linear"
            if not 0 <= sparsity < 1:
                return f"the budget of {name} is {sparsity}, which is outside [0, 1)"
        return None

    def restrict(self, linears: Iterable[str]) -> Budgets:
        names = set(linears)
        return Budgets({n: s for n, s in self.sparsities.items() if n in names})

    def merge(self, other: Budgets) -> Budgets:
        return Budgets({**self.sparsities, **other.sparsities})


@dataclass(frozen=True)
class Measurements(Fact):
    """What budgets are computed from; known only while `allocate-sparsity` runs.

    Args:
        values: By linear: its error at each probe, or the outlier share of its layer.
    """

    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        known = {linear.name for linear in find_linears(program)}
        missing = [name for name in self.values if name not in known]
        return f"a measurement of {missing[0]}, which is not a linear" if missing else None

    def restrict(self, linears: Iterable[str]) -> Measurements:
        names = set(linears)
        return Measurements({n: v for n, v in self.values.items() if n in names})

    def merge(self, other: Measurements) -> Measurements:
        return Measurements({**self.values, **other.values})
