"""The training loop of induce-sparsity: from first scales to the ones that do best on held-out data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.induction import Induction, Objective
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup
from zeroskip.ir.stage_error import StageError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How scales are trained, and how the result is chosen.

    Args:
        epochs: Times that the batches are seen.
        learning_rate: Of Adam, cosine to zero.
        limit: Scales stay in [1 / limit, limit].
        held_out: Share of the batches that only the choice at the end sees.
        guard: Choose between the scales learned, the first ones and none; else what was learned.
        seed: Order of the batches.
    """

    epochs: int
    learning_rate: float
    limit: float
    held_out: float
    guard: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Learned:
    """Scales and shifts of a stage, and its error on the held-out batches with and without them.

    Args:
        before: Relative squared error without them.
        after: The same with them.
        logs: Natural logarithms of the scales, by group, float32 [size].
        shifts: By group, float32 [size], for those that are shifted.
        kept: Whether they are worth folding.
    """

    before: float
    after: float
    logs: Tensors
    shifts: Tensors
    kept: bool


def learn_scales(
    program: Program,
    linears: Sequence[Linear],
    groups: Sequence[ScaleGroup],
    start: tuple[Tensors, Tensors],
    objective: Objective,
    schedule: Schedule,
) -> Learned:
    """Trains the scales of one stage.

    Args:
        program: The stage, with calibration batches.
        linears: What will be pruned.
        groups: What is scaled.
        start: The first logarithms and shifts.
        objective: What is minimised.
        schedule: How.
    """
    count = len(program.calibration)
    held = min(math.ceil(schedule.held_out * count), count - 1)
    # The last ones, which training does not see; a single batch has to serve for both.
    seen, held_out = range(count - held), range(count - max(held, 1), count)
    with StageError(program) as error:
        induction = Induction(program, error, linears, groups, objective)

        def judged(logs: Tensors, shifts: Tensors) -> float:
            with torch.no_grad():
                errors = [float(induction.error(i, logs, shifts)) for i in held_out]
            return sum(errors) / len(errors)

        before = judged({g.name: torch.zeros(g.size) for g in groups}, {})
        first = Learned(before, judged(*start), *start, True)
        with torch.enable_grad():
            trained = _train(induction, seen, *start, schedule)
        last = Learned(before, judged(*trained), *trained, True)
    if not schedule.guard:
        return last
    best = min(first, last, key=lambda found: found.after)
    return dataclasses.replace(best, kept=best.after < before)


def _train(
    induction: Induction,
    batches: Sequence[int],
    logs: Tensors,
    shifts: Tensors,
    schedule: Schedule,
) -> tuple[Tensors, Tensors]:
    """Follows the gradient; returns what it was given, moved."""
    logs = {name: value.clone().requires_grad_() for name, value in logs.items()}
    shifts = {name: value.clone().requires_grad_() for name, value in shifts.items()}
    parameters = [*logs.values(), *shifts.values()]
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    steps = max(schedule.epochs * len(batches), 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(schedule.seed)
    bound = math.log(schedule.limit)
    for _ in range(schedule.epochs):
        for number in torch.randperm(len(batches), generator=generator).tolist():
            loss = induction.loss(batches[number], logs, shifts)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            cosine.step()
            with torch.no_grad():
                for value in logs.values():
                    value.sub_(value.mean()).clamp_(-bound, bound)
    return (
        {name: value.detach() for name, value in logs.items()},
        {name: value.detach() for name, value in shifts.items()},
    )
