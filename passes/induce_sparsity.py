"""induce-sparsity: learn the channel scales under which pruning costs least, and fold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.induction import Induced, Objective, Outcome
from zeroskip.ir.initial_scales import from_median_and_mean, means
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.medians import medians_and_means
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.ir.scaled_linear import scales_rows_and_columns
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.shift_folding import fold_shift, why_not_shifted
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.exact_folding import Reference, fold_exactly, tolerance
from zeroskip.passes.observe import Observe
from zeroskip.passes.pattern_pass import PatternPass, next_unmoved_by_scales
from zeroskip.passes.scale_learning import Learned, Schedule, learn_scales
from zeroskip.passes.scale_methods import (
    activation_scales,
    normalized,
    rooted,
    seen_consumers,
)

SCORES = ("magnitude", "wanda", "sparsegpt")
TARGETS = ("dense", "stage")
INITS = ("rms", "paper", "ones")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InduceSparsity(Pass):
    """Learns the scales of every group of a stage under which its pruned form errs least.

    The learned scales are folded, so the program computes what it did, and any pruner may follow.
    There are two streams of activations: a stage gets what comes out of the stages before it, pruned
    if they were, and is to give what it gave when nothing was. Scales start from statistics and follow the gradient of

        ||pruned - dense||^2 / ||dense||^2 + regularization * exp(-alpha * sum sigma_1(W) / ||W||_F)

    which reaches them through straight-through masks. They keep a geometric mean of 1 and stay in
    [1 / limit, limit]. Scales, scores and losses are float32, the stage runs in its own type.

    Some of the calibration batches are held out. A stage keeps what does best on them, hard masks
    and all: the scales learned, those it started from, or none. The fact `Induced` says which.

    A scale of input channels cancels out of the scores of Wanda and SparseGPT, compared within rows or
    N:M groups: nothing is learned for them, and nothing is folded. Magnitudes change most.

    Args:
        pattern: What the pruner will keep.
        score: How it will score: `magnitude`, `wanda`, or, where nothing is to be learned, `sparsegpt`.
        target: `dense`: the two streams; `stage`: what the dense stage makes of its pruned inputs.
        init: Where scales start. `rms`: sqrt(E[x^2]), under which magnitude is Wanda (Wanda itself
            starts from ones). `paper`: ((median - mean_weight * mean)^2)^kappa. `ones`.
        epochs: Times that the batches are seen.
        learning_rate: Of Adam on log-scales, cosine to zero.
        temperature: Width of the soft masks, in log score.
        refresh: Steps between two choices of what is kept.
        regularization: Weight of the regulariser; 0 leaves it out.
        alpha: Its rate. 0: 1 / number of linears; when literal, 1 / the sum of norms at the start.
        limit: Bound of the scales.
        kappa: See `init`; 1 is the paper's.
        mean_weight: See `init`; the paper's g is only said to be monotone.
        held_out: Share of the batches that only the choice at the end sees: at least one, and at least
            one is left to learn from. A single batch has to serve for both.
        guard: Make that choice; without it, what was learned is folded.
        literal: The paper as published: its init (kappa 1), hard masks, exp(-alpha * sum ||W||_p),
            |W| sqrt(diag H) s as Wanda's score, and shifts of inputs where biases can take them.
            Scales commute with hard masks, so only the regulariser moves them; shifts do follow the
            error. The paper gives no value for learning rate, regularization, alpha, p and limit.
        p: Operator norm of the literal regulariser: 1 (largest column sum) or 2 (spectral).
        shift: Learn shifts when literal; they start from the mean.
        seed: Order of the batches, first vectors of the power iteration.
        include: Patterns of linears that will be pruned, as for the pruner.
        exclude: Patterns of linears that will stay dense.

    Before::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact ScaleGroups

    After::

        %1 = layer_norm(x, [8], @norm.weight, @norm.bias) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact FoldedScales
        fact Induced
        fact ScaleGroups

    Source: Jiang et al., "Sparsity Induction", arXiv 2602.21652.
    """

    pattern: str | SparsityPattern = "50%"
    score: str = "magnitude"
    target: str = "dense"
    init: str = "rms"
    epochs: int = 3
    learning_rate: float = 1e-2
    temperature: float = 0.05
    refresh: int = 1
    regularization: float = 1e-2
    alpha: float = 0.0
    limit: float = 16.0
    kappa: float = 0.25
    mean_weight: float = 1.0
    held_out: float = 0.25
    guard: bool = True
    literal: bool = False
    p: float = 2.0
    shift: bool = True
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "induce-sparsity"
    requires = (ScaleGroups,)
    provides = (FoldedScales, Induced)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", str(parse_pattern(self.pattern)))
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, Unstructured) and pattern.comparison == "global":
            raise PatternError(
                f"{pattern} compares all linears of the model, and scales are learned by stage",
                pass_name=self.name,
                next_step='use "50%" (per row) or "50% matrix"',
            )
        for option, known in (
            ("score", SCORES),
            ("target", TARGETS),
            ("init", INITS),
            ("p", (1.0, 2.0)),
        ):
            if getattr(self, option) not in known:
                raise CompileError(
                    f"there is no {option} {getattr(self, option)!r}",
                    pass_name=self.name,
                    next_step=f"one of {', '.join(str(value) for value in known)}",
                )
        if self.score == "sparsegpt" and not self._is_idle():
            raise CompileError(
                "there are no scales to learn for SparseGPT: its scores follow weights that change "
                "as it goes",
                pass_name=self.name,
                next_step='take score "magnitude" or "wanda"; in rows and N:M groups nothing is needed',
            )
        ranges = {
            "epochs": self.epochs >= 0,
            "learning_rate": self.learning_rate > 0,
            "temperature": self.temperature > 0,
            "refresh": self.refresh >= 1,
            "regularization": self.regularization >= 0,
            "alpha": self.alpha >= 0,
            "limit": self.limit >= 1,
            "kappa": self.kappa > 0,
            "held_out": 0 < self.held_out < 1,
        }
        for option, fits in ranges.items():
            if not fits:
                raise CompileError(
                    f"{option} is {getattr(self, option)}, which is out of range",
                    pass_name=self.name,
                )

    @property
    def scope(self) -> Scope:
        return "block"

    @property
    def uses_dense_outputs(self) -> bool:
        return self.target == "dense" and not self._is_idle()

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)
        pattern = parse_pattern(self.pattern)
        for linear in select_linears(program, self.include, self.exclude):
            reason = pattern.refusal(linear.shape)
            if reason is not None:
                raise PatternError(
                    f"{pattern} does not fit: {reason}",
                    where=linear.name,
                    pass_name=self.name,
                    next_step=f'leave it dense with exclude=("{linear.name}",)',
                )

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def warning(self, later: Sequence[Pass]) -> str | None:
        unmoved = next_unmoved_by_scales(later)
        if unmoved is not None and not (self.literal and self.shift):
            return (
                f"{self.name} changes nothing that {unmoved.name} decides: its scores "
                "are compared where a scale cancels out of them"
            )
        pruner = next((step for step in later if isinstance(step, PatternPass)), None)
        if pruner is not None and pruner.pattern != self.pattern:
            return f"{self.name} learns for {self.pattern}, {pruner.name} prunes {pruner.pattern}"
        return None

    def run(self, program: Program) -> Program:
        linears = select_linears(program, self.include, self.exclude)
        known = program.facts.get(Induced, Induced())
        assert isinstance(known, Induced)
        groups = self._groups(program, linears, known)
        if not groups:
            return program.with_fact(program.facts.get(FoldedScales, FoldedScales()), known)
        self._need_calibration(program)
        if self._is_idle():
            before = after = None
            reason = f"a scale cancels out of {self.score} scores, compared as in {self.pattern}"
            program = _refuse(program, groups, reason)
        else:
            found = self._learned(program, linears, groups)
            before, after = found.before, found.after
            reason = f"pruning errs by {after:.3g} with scales, by {before:.3g} without"
            program = (
                self._folded(program, found) if found.kept else _refuse(program, groups, reason)
            )
        refused = program.fact(FoldedScales).refused
        outcomes = {
            group.name: Outcome(group.linears, str(self), before, after, group.name not in refused)
            for group in groups
        }
        return program.with_fact(known.merge(Induced(outcomes)))

    def _is_idle(self) -> bool:
        """Whether no scale can change what is kept: it cancels out of each comparison."""
        pattern = parse_pattern(self.pattern)
        by_row = isinstance(pattern, NM) or (
            isinstance(pattern, Unstructured) and pattern.comparison == "row"
        )
        return self.score in ("wanda", "sparsegpt") and by_row and not self.literal

    def _groups(
        self, program: Program, linears: Sequence[Linear], known: Induced
    ) -> list[ScaleGroup]:
        """The groups to learn; one that these options were tried on already is left as it is."""
        names = {linear.name for linear in linears}
        return [
            group
            for group in program.fact(ScaleGroups).groups.values()
            if not names.isdisjoint(group.linears)
            and scales_rows_and_columns(group, linears)
            and not (
                group.name in known.outcomes and known.outcomes[group.name].settings == str(self)
            )
        ]

    def _learned(
        self, program: Program, linears: Sequence[Linear], groups: Sequence[ScaleGroup]
    ) -> Learned:
        edges = self._statistics(program, linears).edges
        program = program.with_fact(Statistics(edges))
        diagonals = {n.name: edges[n.name].root_mean_square().square() for n in linears}
        objective = Objective(
            parse_pattern(self.pattern),
            diagonals if self.score == "wanda" else None,
            self.literal,
            self.temperature,
            self.refresh,
            self.regularization,
            self.alpha,
            self.p,
            self.seed,
        )
        schedule = Schedule(
            self.epochs, self.learning_rate, self.limit, self.held_out, self.guard, self.seed
        )
        start = self._start(program, linears, groups)
        return learn_scales(program, linears, groups, start, objective, schedule)

    def _statistics(self, program: Program, linears: Sequence[Linear]) -> Statistics:
        known = program.facts.get(Statistics)
        if isinstance(known, Statistics) and known.edges.keys() >= {n.name for n in linears}:
            return known
        observed = Observe(include=self.include, exclude=self.exclude).run(program)
        return observed.fact(Statistics)

    def _start(
        self, program: Program, linears: Sequence[Linear], groups: Sequence[ScaleGroup]
    ) -> tuple[Tensors, Tensors]:
        """Logarithms of the first scales, and the first shifts."""
        by_name = {linear.name: linear for linear in find_linears(program)}
        moments = {}
        if self.literal or self.init == "paper":
            moments = medians_and_means(program, linears)
        logs, shifts = {}, {}
        for group in groups:
            scales = None
            if moments and group.consumers:
                kappa = 1.0 if self.literal else self.kappa
                found = from_median_and_mean(group, moments, self.mean_weight, kappa)
                scales = rooted(found, group)
            elif self.init == "rms" and self.score == "magnitude":
                scales = activation_scales(group, seen_consumers(program, group))
            if scales is None:
                scales = torch.ones(group.size, dtype=torch.float64)
            logs[group.name] = normalized(scales, self.limit).log().float()
            if self.literal and self.shift and why_not_shifted(program, group, by_name) is None:
                shifts[group.name] = means(group, moments).float()
        return logs, shifts

    def _folded(self, program: Program, found: Learned) -> Program:
        """Folds shifts and scales; a group whose fold moves the outputs is left as it was."""
        linears = {linear.name: linear for linear in find_linears(program)}
        refused = {}
        if found.shifts:
            reference, limit = Reference.of(program), tolerance(program)
            for name, shift in found.shifts.items():
                group = program.fact(ScaleGroups).groups[name]
                shifted = fold_shift(program, group, shift, linears)
                moved = reference.drift(shifted)
                if moved <= limit:
                    program = shifted
                else:
                    refused[name] = f"its shift moved the outputs by {moved:.3g}"
        scales = {name: log.double().exp() for name, log in found.logs.items()}
        folded = fold_exactly(program, scales)
        return folded.with_fact(folded.fact(FoldedScales).merge(FoldedScales({}, refused)))


def _refuse(program: Program, groups: Sequence[ScaleGroup], reason: str) -> Program:
    known = program.facts.get(FoldedScales, FoldedScales())
    assert isinstance(known, FoldedScales)
    refused = FoldedScales({}, {group.name: reason for group in groups})
    return program.with_fact(known.merge(refused))
