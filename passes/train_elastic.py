"""train-elastic: adapters that make one weight serve every sparsity of a range."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zeroskip.ir.elastic import (
    HIERARCHIES,
    LEVELS,
    Elastic,
    ElasticLinear,
    Hierarchy,
    adapted,
    adapters_of,
    rank_levels,
)
from zeroskip.ir.elastic_training import (
    GROUPS,
    ElasticSchedule,
    ElasticStage,
    draw_thresholds,
    mix_outputs,
    serve_lowest,
    share_groups,
    start_adapters,
    thresholds_of,
    train_elastic,
)
from zeroskip.ir.errors import CompileError, PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.sparse_training import split
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.weights import all_finite
from zeroskip.passes.base import Pass, Scope
from zeroskip.passes.observe import Observe
from zeroskip.passes.pattern_pass import saw_too_little, warn_of_few_tokens

LOSSES = ("token", "stage")
MIXERS = ("mixed", "drawn", "dense")


@dataclass(frozen=True)
class TrainElastic(Pass):
    """Learns, stage by stage, thin adapters with which one dense weight serves many sparsities.

    Weights stay as they are, and the program computes what it did: what is learned is the fact
    `Elastic`, from which `MaterializeElastic` makes a sparse program at any sparsity in seconds. Masks
    come from the importance |W| * RMS of the dense model's activations, once; they are nested.

    Between stages flows a mixture of what the stage gives at one sparsity of each group, so that a
    later stage learns to bear inputs of many sparsities.

    Refuses a program that is pruned already, one without calibration data, and groups in which the
    family has no pattern. Takes, for each batch and epoch, a forward and a backward run for every group:
    `quick()` is a setting for a first look.

    Args:
        groups: Upper edges of the groups of sparsities; the first begins at 0.
        rank: Of each group's adapters.
        family: `rows`, or M of n:M patterns such as 8.
        epochs: Times that the batches are seen.
        learning_rate: First step of Adam; cosine to zero.
        hierarchy: A group uses the adapters of all groups up to it (`nested`), one set of all
            (`shared`), or its own (`independent`).
        mixer: What enters the next stage: the mixture (`mixed`), the output at one sparsity drawn
            for each batch (`drawn`), or what the dense stage gives (`dense`).
        loss: `token`: the error of each token relative to its size; `stage`: of all tokens together.
        check_lowest: Do without the adapters of the lowest group where none are better at 30 %.
        held_out: Share of the batches that this is decided on.
        seed: Of sparsities, the order of batches and where adapters begin.
        include: Patterns of linears, as for the pruners.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Elastic

    Source: Xu et al., "Elastic Post-Training Sparsity", arXiv 2606.25285: hierarchy, mixer and the
    check of the lowest group; its loss is `stage` without the division by the size.
    """

    groups: tuple[float, ...] = GROUPS
    rank: int = 8
    family: str = "rows"
    epochs: int = 10
    learning_rate: float = 1e-3
    hierarchy: Hierarchy = "nested"
    mixer: str = "mixed"
    loss: str = "token"
    check_lowest: bool = True
    held_out: float = 0.1
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "train-elastic"
    provides = (Elastic,)
    refuses = (SparseWeights,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", str(self.family))
        numbers = isinstance(self.groups, (tuple, list)) and all(
            isinstance(edge, (int, float)) for edge in self.groups
        )
        self._refuse_unless({"groups": numbers, "rank": isinstance(self.rank, int)})
        object.__setattr__(self, "groups", tuple(float(edge) for edge in self.groups))
        edges = (0.0, *self.groups)
        rises = all(low < high for low, high in zip(edges, self.groups, strict=False))
        self._refuse_unless(
            {
                "groups": bool(self.groups) and rises and self.groups[-1] < 1,
                "rank": self.rank >= 1,
                "family": self.family == "rows" or self._size() in (2, 4, 8, 16, 32),
                "epochs": self.epochs >= 1,
                "learning_rate": 0 < self.learning_rate < math.inf,
                "hierarchy": self.hierarchy in HIERARCHIES,
                "mixer": self.mixer in MIXERS,
                "loss": self.loss in LOSSES,
                "held_out": 0 < self.held_out < 1,
            }
        )
        for group, edge in enumerate(self.groups):
            if thresholds_of(self._empty(), group):
                continue
            if self.family == "rows":
                raise RecipeError(
                    f"the group up to {edge:g} holds none of the {LEVELS} levels of importance",
                    pass_name=self.name,
                    next_step=f"choose edges at least 1/{LEVELS} apart",
                )
            raise RecipeError(
                f"no n:{self.family} pattern prunes as much as a group up to {edge:g} allows",
                pass_name=self.name,
                next_step="choose edges that are shares of the pattern, such as 0.5 and 0.75 for 8",
            )

    @classmethod
    def quick(cls, **options: object) -> TrainElastic:
        """Returns a setting for a first look, about a tenth of the default's work, and worse."""
        # On one layer of SmolLM2, 24 steps of 3e-3 took a fifth off the error, of 1e-3 a seventh.
        first = {"groups": (0.5, 0.6, 0.7), "epochs": 2, "learning_rate": 3e-3}
        return cls(**{**first, **options})  # type: ignore[arg-type]

    @property
    def scope(self) -> Scope:
        return "block"

    @property
    def uses_dense_outputs(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)
        known = program.facts.get(Elastic)
        if isinstance(known, Elastic):
            self._refuse_other(known)
        for linear in select_linears(program, self.include, self.exclude):
            if linear.in_features % (self._empty().group_of_weights or 1):
                raise PatternError(
                    f"n:{self.family} does not fit a width of {linear.in_features}",
                    where=linear.name,
                    pass_name=self.name,
                    next_step=f'leave it dense with exclude=("{linear.name}",)',
                )

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def run(self, program: Program) -> Program:
        linears = select_linears(program, self.include, self.exclude)
        known = program.facts.get(Elastic, self._empty())
        assert isinstance(known, Elastic)
        self._refuse_other(known)
        is_done = known.settings == str(self)
        if not linears or (is_done and all(n.name in known.linears for n in linears)):
            return program.with_fact(known)
        program_of_two = _with_dense(program)
        elastic = self._start(program_of_two, linears)
        stage = ElasticStage(program_of_two, linears, elastic)
        seen, held_out = split(len(program.calibration), self.held_out)
        schedule = ElasticSchedule(
            self.epochs, self.learning_rate, self.loss == "token", self._seed_of(linears)
        )
        train_elastic(stage, schedule, seen)
        trained = stage.result()
        self._refuse_diverged(trained, program, linears)
        if self.check_lowest and not serve_lowest(stage, held_out, self.loss == "token"):
            found = {
                n: dataclasses.replace(e, serves_lowest=False) for n, e in trained.linears.items()
            }
            trained = dataclasses.replace(trained, linears=found)
        return program.with_fact(known.merge(trained))

    def propagate(self, program: Program) -> Callable[[Batch], Batch] | None:
        found = program.facts.get(Elastic)
        linears = select_linears(program, self.include, self.exclude)
        names = {linear.name for linear in linears}
        if self.mixer == "dense" or not linears or not isinstance(found, Elastic):
            return None
        stage = ElasticStage(program, linears, found.restrict(names))
        generator = torch.Generator().manual_seed(self._seed_of(linears) + 1)
        shares = share_groups(self.groups)
        if self.mixer == "mixed":
            drawn = [
                draw_thresholds(found, group, 1, generator)[0] for group in range(len(self.groups))
            ]
            return lambda batch: mix_outputs(stage, drawn, shares, batch)

        def run_one(batch: Batch) -> Batch:
            group = int(torch.multinomial(torch.tensor(shares), 1, generator=generator))
            threshold = draw_thresholds(found, group, 1, generator)[0]
            with torch.no_grad():
                return stage.run(batch, threshold, group)

        return run_one

    def _start(self, program: Program, linears: list[Linear]) -> Elastic:
        """Returns levels from the dense stream, and adapters that change nothing yet."""
        dense = dataclasses.replace(program, calibration=program.dense_inputs)
        statistics = Observe().run(dense).fact(Statistics)
        generator = torch.Generator().manual_seed(self._seed_of(linears))
        unseen: list[str] = []
        found = {}
        for linear in linears:
            edge = statistics.of(linear.name)
            if few := saw_too_little(linear, edge):
                unseen.append(linear.name)
            norms = torch.ones(linear.in_features) if few else _norms(edge)
            importance = linear.weight(program).detach().float().abs() * norms
            levels = rank_levels(importance, self._empty().group_of_weights)
            up, down = start_adapters(linear, len(self.groups), self.rank, generator)
            found[linear.name] = ElasticLinear(levels, norms, up, down)
        warn_of_few_tokens(unseen, self.name)
        return dataclasses.replace(self._empty(), linears=found)

    def _refuse_other(self, known: Elastic) -> None:
        """Linears of one program share their groups."""
        mine = self._empty()
        if known.linears and (known.groups, known.group_of_weights, known.hierarchy) != (
            mine.groups,
            mine.group_of_weights,
            mine.hierarchy,
        ):
            raise RequirementError(
                f"the program is elastic already, with groups {known.groups} "
                f"of {known.group_of_weights or 'rows'}, {known.hierarchy}",
                pass_name=self.name,
                next_step="give all train-elastic passes the same groups, family and hierarchy",
            )

    def _refuse_diverged(self, elastic: Elastic, program: Program, linears: list[Linear]) -> None:
        """Adapters that a sparsity of some group cannot be made with are told now, not then."""
        for linear in linears:
            found = elastic.linears[linear.name]
            dense = linear.weight(program).detach()
            for group in range(len(self.groups)):
                used = adapters_of(group, len(self.groups), self.hierarchy)
                if not all_finite(adapted(dense, found.up, found.down, used).to(dense.dtype)):
                    raise CompileError(
                        f"training diverged: the weight of the group up to {self.groups[group]:g} "
                        f"is not finite in {str(dense.dtype).removeprefix('torch.')}",
                        where=linear.name,
                        pass_name=self.name,
                        next_step=f"choose a learning_rate below {self.learning_rate:g}",
                    )

    def _empty(self) -> Elastic:
        size = 0 if self.family == "rows" else self._size()
        return Elastic(self.groups, size, self.hierarchy, settings=str(self))

    def _size(self) -> int:
        return int(self.family) if self.family.isdigit() else -1

    def _seed_of(self, linears: list[Linear]) -> int:
        # Stages differ, and do not depend on which others were trained before.
        return self.seed + zlib.crc32(linears[0].name.encode())


def _norms(edge: EdgeStatistics) -> torch.Tensor:
    return edge.root_mean_square().float()


def _with_dense(program: Program) -> Program:
    """Returns the program with a dense stream: where it comes with none, nothing was pruned."""
    if program.dense_outputs:
        return program
    running = program.loaded()
    inputs = [{name: batch[name] for name in program.inputs} for batch in program.calibration]
    outputs = [running.run(batch) for batch in inputs]
    return dataclasses.replace(program, dense_inputs=inputs, dense_outputs=outputs)
