"""What Sparsity Induction minimises: the error that pruning will cost, seen from the scales.

A positive scale commutes with a mask: ((W S) * M)(S^-1 x) = (W * M) x. So scales matter through the
mask that they lead to and in no other way, and the stage is run with its own weights, masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import Linear
from zeroskip.ir.matrix_norms import PowerIteration, frobenius_norm, largest_column_sum
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup
from zeroskip.ir.scaled_linear import ScaledLinear, scaled_linears, stacked_weights
from zeroskip.ir.score_refresh import refreshed_scores
from zeroskip.ir.shift_folding import shifted_biases
from zeroskip.ir.stage_error import StageError
from zeroskip.ir.straight_through import find_thresholds, straight_through

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of inducing sparsity in a group.

    Args:
        linears: The linears that the group has members in.
        settings: The pass with its options, as text.
        before: Relative squared error of the stage, pruned without scales, on held-out batches; None
            where scales cannot matter.
        after: The same with the scales that were learned.
        kept: Whether they were folded.
    """

    linears: tuple[str, ...]
    settings: str
    before: float | None
    after: float | None
    kept: bool


@dataclass(frozen=True)
class Induced(Fact):
    """The groups that scales were learned for, and what came of it."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        for name, outcome in self.outcomes.items():
            errors = (outcome.before, outcome.after)
            if not all(error is None or math.isfinite(error) for error in errors):
                return f"an error of {name} is not finite"
        return None

    def restrict(self, linears: Iterable[str]) -> Induced:
        names = set(linears)
        return Induced({n: o for n, o in self.outcomes.items() if names.issuperset(o.linears)})

    def merge(self, other: Induced) -> Induced:
        return Induced({**self.outcomes, **other.outcomes})


@dataclass(frozen=True)
class Objective:
    """Which pruning is foreseen, and how it is made differentiable.

    Args:
        pattern: What will be kept.
        diagonals: E[x^2] of the inputs of each linear where scores look at them; None: magnitudes.
        literal: As published: masks are hard, the regulariser counts norms instead of stable ranks,
            and scores with diagonals are |W| sqrt(diag H) s, by the unscaled weight.
        temperature: Width of the soft masks.
        refresh: After how many steps what is kept is chosen anew.
        regularization: Weight of the regulariser; 0 leaves it out.
        alpha: Its rate; 0: such that the exponent is -1 before training where it counts norms, and
            the mean of the linears where it counts stable ranks.
        p: Which operator norm it counts: 1 or 2.
        seed: Draws the first vectors of the power iteration.
    """

    pattern: SparsityPattern
    diagonals: Tensors | None
    literal: bool
    temperature: float
    refresh: int
    regularization: float
    alpha: float
    p: float
    seed: int


@dataclass(eq=False)
class _Mask:
    """What was kept when scores were last compared, the thresholds then, and the steps since."""

    keep: torch.Tensor
    thresholds: torch.Tensor | None = None
    uses: int = 0


class Induction:
    """One stage under scales and shifts that are being learned.

    Holds the weights of the linears that will be pruned twice more, in float32.

    Args:
        program: The stage.
        error: How far it moves.
        linears: What will be pruned.
        groups: What is scaled.
        objective: See there.
    """

    def __init__(
        self,
        program: Program,
        error: StageError,
        linears: Sequence[Linear],
        groups: Sequence[ScaleGroup],
        objective: Objective,
    ) -> None:
        self._program = program
        self._error = error
        self._groups = {group.name: group for group in groups}
        self._linears = {linear.name: linear for linear in linears}
        self._objective = objective
        self._sites = scaled_linears(program, linears, groups)
        self._masks: dict[str, _Mask] = {}
        generator = torch.Generator().manual_seed(objective.seed)
        counts_norms = objective.regularization > 0 and objective.p == 2
        self._spectral = [
            PowerIteration(site.weight, generator) if counts_norms else None for site in self._sites
        ]
        self._alpha = objective.alpha
        if not self._alpha and objective.regularization:
            unscaled = {g.name: torch.zeros(g.size) for g in groups}
            size = float(self._norms(unscaled)) if objective.literal else len(self._sites)
            self._alpha = 1 / max(size, 1e-30)

    def loss(self, index: int, logs: Tensors, shifts: Tensors) -> torch.Tensor:
        """Returns what is minimised, on one batch.

        Args:
            index: Of the batch.
            logs: Logarithms of the scales by group, natural, [size] each.
            shifts: By group, [size] each, for those that are shifted.
        """
        objective = self._objective
        total = torch.zeros(())
        # Under hard masks no gradient reaches the scales; only shifts need the stage to run.
        if shifts or not objective.literal:
            total = self.error(index, logs, shifts)
        if objective.regularization:
            rank_or_norm = torch.exp(-self._alpha * self._norms(logs))
            total = total + objective.regularization * rank_or_norm
        return total

    def error(self, index: int, logs: Tensors, shifts: Tensors) -> torch.Tensor:
        """Returns the relative squared error of the pruned stage on one batch."""
        pruned, lost = [], {}
        for site in self._sites:
            weight = site.weight * self._mask(site, logs)
            pruned.append((site.linear, weight))
            if shifts:
                lost[site.linear.name] = site.weight - weight
        parameters = stacked_weights(self._program, pruned)
        for name, shift in shifts.items():
            group = self._groups[name]
            changes = shifted_biases(self._program, group, shift, self._linears, lost)
            for bias, change in changes.items():
                before = parameters.get(bias, self._program.weights[bias].detach())
                parameters[bias] = (before.float() + change).to(before.dtype)
        return self._error(index, parameters)

    def _mask(self, site: ScaledLinear, logs: Tensors) -> torch.Tensor:
        """What is kept: booleans, or numbers that scales receive a gradient through."""
        objective = self._objective
        name = site.linear.name
        rows, columns = site.rows(logs), site.columns(logs)
        diagonal = torch.ones(site.weight.shape[1])
        if objective.diagonals is not None:
            diagonal = objective.diagonals[name].float()
            # What scales a column shrinks its input as much; the paper lets one of them count.
            if objective.literal:
                rows = torch.zeros_like(rows)
            else:
                columns = torch.zeros_like(columns)
        if not torch.is_grad_enabled():
            return self._keep(site, rows, columns, diagonal)
        # Finding what is kept costs more than running the stage.
        is_due = name not in self._masks or self._masks[name].uses == objective.refresh
        if is_due:
            self._masks[name] = _Mask(self._keep(site, rows, columns, diagonal))
        mask = self._masks[name]
        mask.uses += 1
        if objective.literal:
            return mask.keep
        columns = columns + diagonal.clamp(min=1e-30).log() / 2
        log_scores = site.log_weight + rows.unsqueeze(1) + columns
        if mask.thresholds is None:
            mask.thresholds = find_thresholds(log_scores, mask.keep, objective.pattern)
        return straight_through(
            log_scores, mask.keep, mask.thresholds, objective.pattern, objective.temperature
        )

    @torch.no_grad()
    def _keep(
        self, site: ScaledLinear, rows: torch.Tensor, columns: torch.Tensor, diagonal: torch.Tensor
    ) -> torch.Tensor:
        scores = refreshed_scores(site.weight, diagonal, columns.exp()) * rows.exp().unsqueeze(1)
        return self._objective.pattern.project(scores)

    def _norms(self, logs: Tensors) -> torch.Tensor:
        """The sum over linears of the norm, or of its share of the Frobenius norm."""
        total = torch.zeros(())
        for site, spectral in zip(self._sites, self._spectral, strict=True):
            rows, columns = site.rows(logs).exp(), site.columns(logs).exp()
            if spectral is None:
                norm = largest_column_sum(site.weight, rows, columns)
            else:
                norm = spectral(rows, columns)
            if not self._objective.literal:
                norm = norm / frobenius_norm(site.weight, rows, columns)
            total = total + norm
        return total
