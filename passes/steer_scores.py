"""steer-scores: learn what each input channel's scores are to be multiplied by.

    S'_ij = S_ij m_j,    M = what the pattern keeps of S',    error(m) = tr(D G D^T),  D = W - W * M

with G = E[x x^T]. A mask is a step function. What takes the place of its gradient is what flipping
one weight costs, which is known exactly, for the weights whose scores are close to the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.errors import CompileError, PatternError, RecipeError
from zeroskip.ir.linears import Linear
from zeroskip.ir.observers import insert_observers, read_observers
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers, Statistics, Steering
from zeroskip.ir.weights import zero_outside
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.pruner import Pruner

# Rows of W that one step looks at, a new part each time, and steps between looks at all of it.
ROWS = 256
LOOK = 10


@dataclass(frozen=True)
class SteerScores(Pass):
    """Learns multipliers of the scores, one for each input channel, that lower the output error.

    Nothing is folded and no weight changes: the pruner that follows multiplies its scores by them,
    so that it keeps other weights, as many as before. That also moves masks that no exact scale can
    move, such as Wanda's.

    The error of a linear is ||(W - W * M) x||^2 over the calibration data, in closed form from the
    Gram matrix: `Observe(gram=True)`. Multipliers are learned on most of the batches and kept only
    where they lower the error on the others as well as on all; elsewhere they are 1. With a single
    batch there are no others, and the fact says so.

    Refuses statistics without Gram matrices, and patterns of blocks or across linears.

    Args:
        pruner: The pass whose scores are steered, by name, with its options at their defaults.
        pattern: Its pattern: `2:4`, `50%`, `50% matrix`.
        steps: How many times all multipliers of a linear are improved.
        rate: The first step, in the logarithm of a multiplier.
        temperature: How close, in the logarithm, a score is to the threshold to count.
        limit: Multipliers stay in [1 / limit, limit].
        held_out: Share of the batches that judge.
        include: Patterns of linears, as for the pruner.
        exclude: Patterns of linears to leave out.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact ScoreMultipliers
        fact Statistics

    Source: the reading of eq. 11 of Jiang et al., "Sparsity Induction", arXiv 2602.21652, under
    which its scales change a mask: they multiply the score and not the weight.
    """

    pruner: str = "prune-wanda"
    pattern: str | SparsityPattern = "50%"
    steps: int = 30
    rate: float = 0.1
    temperature: float = 0.02
    limit: float = 16.0
    held_out: float = 0.25
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "steer-scores"
    requires = (Statistics,)
    provides = (ScoreMultipliers,)

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        object.__setattr__(self, "pattern", str(pattern))
        known = isinstance(pattern, NM) or (
            isinstance(pattern, Unstructured) and pattern.comparison != "global"
        )
        if not known:
            raise PatternError(
                f"scores that are compared as in {pattern} cannot be steered",
                pass_name=self.name,
                next_step='use "50%" (per row), "50% matrix" or "2:4"',
            )
        problems = {
            "steps": self.steps >= 0,
            "rate": self.rate > 0,
            "temperature": self.temperature > 0,
            "limit": self.limit >= 1,
            "held_out": 0 <= self.held_out < 1,
        }
        self._refuse_unless(problems)

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._scorer().check(program)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def warning(self, later: Sequence[Pass]) -> str | None:
        pruner = next((step for step in later if isinstance(step, Pruner)), None)
        if pruner is None:
            return f"{self.name} changes nothing: no pruner comes after it"
        if (pruner.name, str(pruner.pattern)) == (self.pruner, str(self.pattern)):
            return None
        return (
            f"{self.name} learns for {self.pruner} at {self.pattern}, and {pruner.name} at "
            f"{pruner.pattern} comes next"
        )

    def run(self, program: Program) -> Program:
        linears = select_linears(program, self.include, self.exclude)
        known = program.facts.get(ScoreMultipliers, ScoreMultipliers())
        assert isinstance(known, ScoreMultipliers)
        # Learned anew from the scores as they are, so that a second run finds the same.
        plain = program.without_facts([ScoreMultipliers])
        grams = self._held_out_statistics(plain, linears)
        found = {}
        for linear in linears:
            program.fact(Statistics).gram_of(linear.name)
            edge = program.fact(Statistics).of(linear.name)
            found[linear.name] = self._steer(plain, linear, edge, grams.edges.get(linear.name))
        return program.with_fact(known.merge(ScoreMultipliers(found)))

    def _scorer(self) -> Pruner:
        from zeroskip.passes import PASSES

        kind = PASSES.get(self.pruner)
        if kind is None or not issubclass(kind, Pruner):
            pruners = [name for name, cls in PASSES.items() if issubclass(cls, Pruner)]
            raise RecipeError(
                f"{self.pruner!r} is not a pruner",
                pass_name=self.name,
                next_step=f"one of {', '.join(pruners)}",
            )
        return kind(self.pattern, self.include, self.exclude)

    def _held_out_statistics(self, program: Program, linears: Sequence[Linear]) -> Statistics:
        """What the last batches alone gave; empty when there are too few to spare any."""
        count = int(len(program.calibration) * self.held_out)
        if self.held_out and len(program.calibration) > 1:
            count = max(count, 1)
        if not count or not linears:
            return Statistics()
        observed = insert_observers(program, linears, gram=True)
        running = observed.loaded()
        for index in range(len(program.calibration) - count, len(program.calibration)):
            batch = program.calibration[index]
            running.run({name: batch[name] for name in observed.inputs})
        return read_observers(observed, linears, program)

    def _steer(
        self, program: Program, linear: Linear, edge: EdgeStatistics, held: EdgeStatistics | None
    ) -> Steering:
        assert edge.gram is not None
        weight = linear.weight(program).float()
        scores = self._scorer().finite_scores(program, linear)
        pattern = parse_pattern(self.pattern)
        training = edge.gram
        judges = held is not None and held.gram is not None and 0 < held.count < edge.count
        if judges:
            assert held is not None
            assert held.gram is not None
            training = edge.gram - held.gram
        learned = learn_multipliers(
            weight, scores, training, pattern, self.steps, self.rate, self.temperature, self.limit
        )
        plain, steered = pattern.project(scores), pattern.project(scores * learned)
        before, after = (squared_error(weight, k, edge.gram) for k in (plain, steered))
        falls = after < before
        if judges:
            assert held is not None
            assert held.gram is not None
            mine = [squared_error(weight, k, held.gram) for k in (plain, steered)]
            falls = falls and mine[1] < mine[0]
        tokens = held.count if judges and held is not None else 0
        if not falls:
            return Steering(torch.ones_like(learned), before, before, tokens)
        return Steering(learned, before, after, tokens)


def squared_error(weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns tr(D G D^T) with D = W - W * keep: the squared output error, summed over outputs."""
    lost = zero_outside(weight, ~keep)
    return float((lost * (lost @ gram)).sum(dtype=torch.float64))


def learn_multipliers(
    weight: torch.Tensor,
    scores: torch.Tensor,
    gram: torch.Tensor,
    pattern: SparsityPattern,
    steps: int = 30,
    rate: float = 0.1,
    temperature: float = 0.02,
    limit: float = 16.0,
) -> torch.Tensor:
    """Returns the multipliers with the least error among those that descent was stopped at to look.

    Args:
        weight: float32 [out, in].
        scores: What the pruner makes of it, float32 [out, in], not negative.
        gram: Sum of x x^T, float32 [in, in].
        pattern: Per row, per matrix or N:M.
        steps: Of descent, each on some of the rows; 0 returns ones.
        rate: The first step, in the logarithm.
        temperature: How close, in the logarithm, a score is to the threshold to count.
        limit: Multipliers stay in [1 / limit, limit].

    Returns:
        float32 [in]; ones when nothing was better than the scores as they are.
    """
    best = torch.ones(scores.shape[1])
    if scores.numel() == 0:
        return best
    if bool((scores < 0).any()):
        raise CompileError("scores below zero cannot be steered by multipliers")
    tiny = torch.finfo(torch.float32).tiny
    least = squared_error(weight, pattern.project(scores), gram)
    logarithm = torch.zeros(scores.shape[1])
    mean, square = torch.zeros_like(logarithm), torch.zeros_like(logarithm)
    bound = math.log(limit)
    stride = -(-scores.shape[0] // ROWS)
    for step in range(1, steps + 1):
        rows = slice(step % stride, None, stride)
        steered = scores[rows] * logarithm.exp()
        keep = pattern.project(steered)
        costs = _flip_costs(weight[rows], keep, gram)
        log_scores = steered.clamp_min_(tiny).log_()
        gradient = _gradient(costs, log_scores, keep, pattern, temperature)
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient.square()
        # As Adam, but a channel that matters little moves little.
        seen = square / (1 - 0.9**step)
        move = mean / (1 - 0.8**step) / (seen + seen.mean()).sqrt().clamp_min(tiny)
        slowing = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
        logarithm = logarithm - rate * slowing * move
        logarithm = (logarithm - logarithm.mean()).clamp(-bound, bound)
        if step % LOOK == 0 or step == steps:
            multipliers = logarithm.exp()
            error = squared_error(weight, pattern.project(scores * multipliers), gram)
            if error < least:
                best, least = multipliers, error
    return best


def _flip_costs(weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Returns by how much the error rises when one weight is kept instead of pruned, or pruned.

    With D = W - W * keep, d_ij changes by w_ij, so the error by (-+) 2 w_ij (D G)_ij + w_ij^2 G_jj.
    """
    linear = (weight.masked_fill(keep, 0) @ gram).mul_(weight).mul_(2)
    own = weight.square() * gram.diagonal()
    return torch.where(keep, own + linear, own - linear)


def _gradient(
    costs: torch.Tensor,
    log_scores: torch.Tensor,
    keep: torch.Tensor,
    pattern: SparsityPattern,
    temperature: float,
) -> torch.Tensor:
    """Returns how the error changes with the logarithm of each multiplier, [in].

    Raising a channel keeps those of its pruned weights that are near the threshold, each in place of
    an average one of those near it that are kept; lowering it does the opposite. The error has a
    kink there: both may make it rise, and then the channel stays.
    """
    rows, columns = costs.shape
    log_scores = _competitors(log_scores, pattern, -torch.inf)
    keep = _competitors(keep, pattern, False)
    costs = _competitors(costs, pattern, 0.0)
    least_kept = log_scores.masked_fill(~keep, torch.inf).amin(0, keepdim=True)
    most_pruned = log_scores.masked_fill(keep, -torch.inf).amax(0, keepdim=True)
    soft = ((log_scores - (least_kept + most_pruned) / 2) / temperature).sigmoid_()
    near = soft.mul_(1 - soft).nan_to_num_(0.0)  # NaN where nothing competes: -inf - -inf.
    kept = near.masked_fill(~keep, 0)
    pruned = near.masked_fill_(keep, 0)
    tiny = torch.finfo(torch.float32).tiny
    pruning = (kept * costs).sum(0, keepdim=True) / kept.sum(0, keepdim=True).clamp_min_(tiny)
    keeping = (pruned * costs).sum(0, keepdim=True) / pruned.sum(0, keepdim=True).clamp_min_(tiny)
    up = _by_channel(pruned * (costs + pruning), pattern, rows, columns)
    down = _by_channel(kept * (costs + keeping), pattern, rows, columns)
    zero = torch.zeros_like(up)
    return torch.where((up < 0) & (up <= down), up, torch.where(down < 0, -down, zero))


def _competitors(values: torch.Tensor, pattern: SparsityPattern, fill: float) -> torch.Tensor:
    """Puts what competes along the first dimension: the row, the matrix or, filled up, the group."""
    if isinstance(pattern, NM):
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % pattern.m), value=fill)
        return padded.view(len(values), -1, pattern.m).permute(2, 0, 1).contiguous()
    whole = isinstance(pattern, Unstructured) and pattern.comparison == "matrix"
    return values.flatten() if whole else values.T


def _by_channel(
    values: torch.Tensor, pattern: SparsityPattern, rows: int, columns: int
) -> torch.Tensor:
    """Sums what `_competitors` put in its order over the rows of the weight, [in]."""
    if isinstance(pattern, NM):
        values = values.permute(1, 2, 0).reshape(rows, -1)[:, :columns]
    elif values.dim() == 2:
        values = values.T
    return values.reshape(rows, columns).sum(0)
