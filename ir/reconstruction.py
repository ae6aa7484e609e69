"""What came of training the weights that pruning kept, as a fact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program

Self = TypeVar("Self", bound="Outcomes")


@dataclass(frozen=True)
class Reconstruction:
    """What came of training the stage that a linear lies in.

    Args:
        settings: The pass and its options, as text.
        before: Error on the held-out batches before training.
        after: The same with what was kept; never above `before`.
        epochs: After how many epochs that was; 0 when nothing was better than the start.
    """

    settings: str
    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class Outcomes(Fact):
    """What came of training, by linear."""

    linears: Mapping[str, Reconstruction] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        known = {linear.name for linear in find_linears(program)}
        for name, found in self.linears.items():
            if name not in known:
                return f"{name} is said to be trained and is not a linear"
            if not math.isfinite(found.after) or found.after > found.before:
                return f"the error of {name} went from {found.before} to {found.after}"
        return None

    def restrict(self: Self, linears: Iterable[str]) -> Self:
        names = set(linears)
        return type(self)({n: r for n, r in self.linears.items() if n in names})

    def merge(self: Self, other: Self) -> Self:
        return type(self)({**self.linears, **other.linears})


class Reconstructed(Outcomes):
    """The linears whose kept weights were trained stage by stage, on the outputs of the stage."""


class Distilled(Outcomes):
    """The linears whose kept weights were trained together, on the outputs of the program."""
