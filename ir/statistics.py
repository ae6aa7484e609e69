"""What was seen of the inputs of linears, and what was learned from it about scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Fact
from zeroskip.ir.program import Program


@dataclass(frozen=True, eq=False)
class EdgeStatistics:
    """What an observer saw on one activation edge, over all tokens that are not padding.

    Args:
        count: Number of tokens.
        total: Sum of x, float64 [in].
        total_of_squares: Sum of x^2, float64 [in].
        abs_max: Largest |x|, float32 [in].
        gram: Sum of x x^T, float32 [in, in], when asked for.
    """

    count: int
    total: torch.Tensor
    total_of_squares: torch.Tensor
    abs_max: torch.Tensor
    gram: torch.Tensor | None = None

    def __add__(self, other: EdgeStatistics) -> EdgeStatistics:
        """Returns the statistics of both edges' tokens together."""
        both = self.gram is not None and other.gram is not None
        return EdgeStatistics(
            count=self.count + other.count,
            total=self.total + other.total,
            total_of_squares=self.total_of_squares + other.total_of_squares,
            abs_max=torch.maximum(self.abs_max, other.abs_max),
            gram=self.gram + other.gram if both else None,  # type: ignore[operator]
        )

    def root_mean_square(self) -> torch.Tensor:
        """Returns sqrt(E[x^2]), float32 [in]; zeros when no token was seen."""
        return (self.total_of_squares / max(self.count, 1)).sqrt().float()

    def variance(self) -> torch.Tensor:
        """Returns E[x^2] - E[x]^2 over tokens, float64 [in], never negative."""
        count = max(self.count, 1)
        return (self.total_of_squares / count - (self.total / count).square()).clamp_min(0)

    def mean(self) -> torch.Tensor:
        """Returns E[x], float64 [in]."""
        return self.total / max(self.count, 1)


@dataclass(frozen=True, eq=False)
class Statistics(Fact):
    """Calibration statistics of the input of each linear; linears that share an edge share them."""

    edges: Mapping[str, EdgeStatistics] = field(default_factory=dict)

    def of(self, linear: str) -> EdgeStatistics:
        """Returns the statistics of one linear.

        Raises:
            RequirementError: There are none; names the linear.
        """
        if linear not in self.edges:
            raise RequirementError(
                "there are no calibration statistics for this linear",
                where=linear,
                next_step="give Observe the same include and exclude as the pruner",
            )
        return self.edges[linear]

    def gram_of(self, linear: str) -> torch.Tensor:
        """Returns the sum of x x^T of one linear, float32 [in, in]; not to be written into.

        Raises:
            RequirementError: It was not recorded; names the linear.
        """
        gram = self.of(linear).gram
        if gram is None:
            raise RequirementError(
                "there is no Gram matrix of its inputs",
                where=linear,
                next_step="put Observe(gram=True) before it, for the same linears",
            )
        return gram

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        widths = {linear.name: linear.in_features for linear in find_linears(program)}
        for name, edge in self.edges.items():
            if name not in widths:
                return f"statistics for {name}, which is not a linear"
            if edge.total_of_squares.shape != (widths[name],):
                return (
                    f"statistics of {name} have {tuple(edge.total_of_squares.shape)} channels, "
                    f"the linear has {widths[name]}"
                )
        return None

    def restrict(self, linears: Iterable[str]) -> Statistics:
        names = set(linears)
        return Statistics({n: e for n, e in self.edges.items() if n in names})

    def merge(self, other: Statistics) -> Statistics:
        return Statistics({**self.edges, **other.edges})


@dataclass(frozen=True, eq=False)
class Steering:
    """What the scores of one linear are multiplied by before a pattern chooses.

    Args:
        multipliers: One for each input channel, float32 [in], all positive.
        error_before: Squared output error on the calibration data without them, summed.
        error_after: The same with them.
        held_out: Number of tokens that they were judged on and not learned from; 0 when they were
            judged on what they were learned from.
    """

    multipliers: torch.Tensor
    error_before: float
    error_after: float
    held_out: int


@dataclass(frozen=True, eq=False)
class ScoreMultipliers(Fact):
    """What pruners multiply their scores by; linears that are not in it are scored as ever."""

    linears: Mapping[str, Steering] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        widths = {linear.name: linear.in_features for linear in find_linears(program)}
        for name, steering in self.linears.items():
            if name not in widths:
                return f"multipliers for {name}, which is not a linear"
            found = steering.multipliers
            if found.shape != (widths[name],):
                return f"{len(found)} multipliers for {name}, which has {widths[name]} inputs"
            if not bool((torch.isfinite(found) & (found > 0)).all()):
                return f"a multiplier of {name} is not a positive number"
        return None

    def restrict(self, linears: Iterable[str]) -> ScoreMultipliers:
        names = set(linears)
        return ScoreMultipliers({n: s for n, s in self.linears.items() if n in names})

    def merge(self, other: ScoreMultipliers) -> ScoreMultipliers:
        return ScoreMultipliers({**self.linears, **other.linears})
