"""Training the adapters of one stage for all groups of sparsities at once.

For each batch, and each group k in turn, a sparsity is drawn from the group, the stage runs on the
stream of activations under the masked and adapted weights, and its output y_k is held against what
the dense stage gives on the dense stream, y:

    loss_0 = |y_0 - y|^2        loss_k = |y_k - stop(y_0)|^2 / 2 + |y_k - y|^2 / 2

One step of Adam follows all groups. Source: arXiv 2606.25285, section 3 and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from zeroskip.ir.elastic import (
    LEVELS,
    Elastic,
    adapters_of,
    at_least,
    correction,
)
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.scaled_linear import stacked_weights
from zeroskip.ir.stage_error import run_with, token_error, token_index

GROUPS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
SHARES = (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2)
"""The paper's groups of sparsities, and what each gives to the activations between stages."""
LOW = 0.3
"""Sparsity at which adapters of the lowest group have to be better than none."""


@dataclass(frozen=True)
class ElasticSchedule:
    """How long and how fast to train.

    Args:
        epochs: Times that the batches are seen.
        learning_rate: First step of Adam; cosine to zero.
        by_token: The error of each token is relative to its size; else that of the stage.
        seed: Of sparsities, the order of batches, and where the adapters begin.
    """

    epochs: int
    learning_rate: float
    by_token: bool
    seed: int


class ElasticStage:
    """A stage with levels and adapters for its linears.

    Args:
        program: The stage; its weights are dense and stay so.
        linears: Those with adapters.
        elastic: Their levels, and adapters to start from.
    """

    def __init__(self, program: Program, linears: Sequence[Linear], elastic: Elastic) -> None:
        self.program = program.loaded()
        self.elastic = elastic
        self._linears = [linear for linear in linears if linear.name in elastic.linears]
        self._dense = {n.name: n.weight(self.program).detach().float() for n in self._linears}
        self.adapters = {
            name: (found.up.clone().requires_grad_(), found.down.clone().requires_grad_())
            for name, found in elastic.linears.items()
        }

    def run(self, batch: Batch, threshold: int, group: int | None) -> dict[str, torch.Tensor]:
        """Runs the stage.

        Args:
            batch: What enters it.
            threshold: Weights of lower levels are pruned.
            group: Whose adapters are used; None for none.
        """
        weights = []
        for linear in self._linears:
            weight = self._dense[linear.name]
            if group is not None:
                groups, hierarchy = len(self.elastic.groups), self.elastic.hierarchy
                used = adapters_of(group, groups, hierarchy)
                weight = weight + correction(*self.adapters[linear.name], used)
            keep = at_least(self.elastic.linears[linear.name].levels, threshold)
            # Several times as fast as masked_fill, there and back.
            weights.append((linear, weight * keep.to(weight.dtype)))
        return run_with(self.program, batch, stacked_weights(self.program, weights))

    def error(self, found: Batch, wanted: Batch, batch: Batch, by_token: bool) -> torch.Tensor:
        """Returns the squared error relative to what is wanted, the mean over outputs."""
        errors = []
        for name, value in found.items():
            if not value.is_floating_point():
                continue
            tokens = token_index(self.program, batch, value)
            value, target = value[tokens].float(), wanted[name][tokens].float()
            if by_token:
                errors.append(token_error(value, target))
            else:
                squares = (value - target).square().sum()
                errors.append(squares / target.square().sum().clamp(min=1e-30))
        return torch.stack(errors).mean() if errors else torch.zeros(())

    def result(self) -> Elastic:
        """Returns the fact with the adapters as they are now."""
        linears = {
            name: replace(found, up=up.detach().clone(), down=down.detach().clone())
            for name, found in self.elastic.linears.items()
            for up, down in [self.adapters[name]]
        }
        return replace(self.elastic, linears=linears)


def train_elastic(stage: ElasticStage, schedule: ElasticSchedule, batches: Sequence[int]) -> float:
    """Trains the adapters of a stage; returns the loss of the last epoch, the mean over its steps.

    Args:
        stage: Comes with `Program.dense_outputs`; its adapters are changed.
        schedule: How long and how fast.
        batches: Those that are trained on.
    """
    program, groups = stage.program, stage.elastic.groups
    parameters = [tensor for pair in stage.adapters.values() for tensor in pair]
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    steps = schedule.epochs * len(batches)
    slowing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(schedule.seed)
    drawn = [draw_thresholds(stage.elastic, k, steps, generator) for k in range(len(groups))]
    step, total = 0, 0.0
    with torch.enable_grad():
        for epoch in range(schedule.epochs):
            order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
            for index in order:
                batch, wanted = program.calibration[index], program.dense_outputs[index]
                first: dict[str, torch.Tensor] = {}
                for group in range(len(groups)):
                    found = stage.run(batch, drawn[group][step], group)
                    loss = stage.error(found, wanted, batch, schedule.by_token)
                    if group:
                        near = stage.error(found, first, batch, schedule.by_token)
                        loss = (loss + near) / 2
                    else:
                        first = {name: value.detach() for name, value in found.items()}
                    loss.backward()  # type: ignore[no-untyped-call]
                    if epoch == schedule.epochs - 1:
                        total += float(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                slowing.step()
                step += 1
    return total / max(len(batches) * len(groups), 1)


def draw_thresholds(
    elastic: Elastic, group: int, count: int, generator: torch.Generator
) -> list[int]:
    """Draws levels within a group of sparsities, one from each of so many equal parts, shuffled."""
    low, high = (0.0, *elastic.groups)[group], elastic.groups[group]
    known = thresholds_of(elastic, group)
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    shares = low + (high - low) * parts / max(count, 1)
    return [min(known, key=lambda t: abs(t - LEVELS * share)) for share in shares.tolist()]


def thresholds_of(elastic: Elastic, group: int) -> list[int]:
    """Returns the levels at which the sparsities of a group prune; empty if the family has none."""
    low, high = (0.0, *elastic.groups)[group], elastic.groups[group]
    step = LEVELS // (elastic.group_of_weights or LEVELS)
    return [t for t in range(step, LEVELS, step) if low < t / LEVELS <= high + 1e-9]


@torch.no_grad()
def serve_lowest(stage: ElasticStage, batches: Sequence[int], by_token: bool) -> bool:
    """Returns whether adapters of the lowest group are at least as good as none at sparsity 0.3.

    Args:
        stage: Trained; comes with dense inputs and outputs.
        batches: Those that decide.
        by_token: As in training.
    """
    program = stage.program
    known = thresholds_of(stage.elastic, 0)
    threshold = min(known, key=lambda t: abs(t - LEVELS * LOW))
    errors = {}
    for group in (0, None):
        total = 0.0
        for index in batches:
            batch = program.dense_inputs[index]
            found = stage.run(batch, threshold, group)
            wanted = program.dense_outputs[index]
            total += float(stage.error(found, wanted, program.calibration[index], by_token))
        errors[group] = total
    return errors[0] <= errors[None]


def mix_outputs(
    stage: ElasticStage, thresholds: Sequence[int], shares: Sequence[float], batch: Batch
) -> dict[str, torch.Tensor]:
    """Returns the outputs of a stage at one sparsity of each group, weighted by shares.

    What is no floating-point value is that of the first group.
    """
    total: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for group, (threshold, share) in enumerate(zip(thresholds, shares, strict=True)):
            for name, value in stage.run(batch, threshold, group).items():
                if not value.is_floating_point():
                    total.setdefault(name, value)
                elif name in total:
                    total[name] = total[name] + share * value
                else:
                    total[name] = share * value
    return total


def start_adapters(
    linear: Linear, groups: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns up, zeros, and down, as LoRA begins: uniform within 1 / sqrt(in)."""
    bound = 1 / math.sqrt(linear.in_features)
    down = torch.rand(groups, rank, linear.in_features, generator=generator)
    return torch.zeros(groups, linear.out_features, rank), (2 * down - 1) * bound


def share_groups(groups: Sequence[float]) -> list[float]:
    """Returns what each group contributes to what enters the next stage; they add up to 1.

    Source: the paper's weights for its seven groups; else, like them, 0.3 for the groups up to 0.5,
    0.3 up to 0.6 and 0.4 above, each shared evenly.
    """
    if tuple(groups) == GROUPS:
        return list(SHARES)
    tilt = {"low": 0.3, "middle": 0.3, "high": 0.4}
    kinds = ["low" if g <= 0.5 else "middle" if g <= 0.6 else "high" for g in groups]
    shares = [tilt[kind] / kinds.count(kind) for kind in kinds]
    return [share / sum(shares) for share in shares]
