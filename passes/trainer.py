"""Trainer: what passes share that train the weights which pruning kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from zeroskip.ir.facts import Mask, SparseWeights
from zeroskip.ir.program import Program
from zeroskip.ir.reconstruction import Outcomes, Reconstruction
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.sparse_training import Loss, Schedule, TrainedParameters, split, train
from zeroskip.ir.statistics import ScoreMultipliers, Statistics
from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class Trainer(Pass):
    """Trains the kept weights of sparse linears under a loss; masks stay.

    Weights are float32 while they are trained, whatever they are stored in, by Adam with a cosine
    schedule. Some calibration batches are held out: what is kept is the state with the least loss on
    them, rounded to the type that it is stored in; where no state is better than the start, the start.

    Args:
        epochs: Times that the training batches are seen.
        learning_rate: First step of Adam, relative to the size (root mean square) of each parameter.
        batch: Calibration batches in one step.
        vectors: Also train biases and the gains of norms.
        held_out: Share of the batches that decide, at least one batch.
        patience: Epochs without an improvement on them before training ends.
        seed: Order of the batches.
        include: Patterns of linears, as for the pruner.
        exclude: Patterns of linears to leave as they are.
    """

    epochs: int = 1
    learning_rate: float = 0.01
    batch: int = 4
    vectors: bool = True
    held_out: float = 0.1
    patience: int = 3
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    requires = (SparseWeights,)
    invalidates = (Statistics, ScoreMultipliers)
    lossy = True
    outcomes: ClassVar[type[Outcomes]]

    def __post_init__(self) -> None:
        self._refuse_unless(
            {
                "epochs": self.epochs >= 1,
                "learning_rate": self.learning_rate > 0,
                "batch": self.batch >= 1,
                "held_out": 0 < self.held_out < 1,
                "patience": self.patience >= 1,
            }
        )

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def _untrained(self, program: Program) -> Mapping[str, Mask]:
        """What is sparse, chosen, and was not trained by these very options before."""
        sparse = program.fact(SparseWeights).masks
        chosen = [n.name for n in select_linears(program, self.include, self.exclude)]
        known = self._known(program).linears
        done = {name for name, found in known.items() if found.settings == str(self)}
        return {name: sparse[name] for name in chosen if name in sparse and name not in done}

    def _trained(self, program: Program, masks: Mapping[str, Mask], loss: Loss) -> Program:
        """Trains, and returns the program with the best weights and what came of it."""
        parameters = TrainedParameters(program, masks, self.vectors)
        seen, held_out = split(len(program.calibration), self.held_out)
        schedule = Schedule(self.epochs, self.learning_rate, self.batch, self.patience, self.seed)
        found = train(parameters, loss, seen, held_out, schedule)
        if found.epochs:
            program = program.with_weights(found.parameters)
        return self._with_outcome(
            program, masks, Reconstruction(str(self), found.before, found.after, found.epochs)
        )

    def _with_outcome(
        self, program: Program, linears: Iterable[str], outcome: Reconstruction | None
    ) -> Program:
        new = {} if outcome is None else dict.fromkeys(linears, outcome)
        return program.with_fact(self._known(program).merge(self.outcomes(new)))

    def _known(self, program: Program) -> Outcomes:
        known = program.facts.get(self.outcomes, self.outcomes())
        assert isinstance(known, Outcomes)
        return known
