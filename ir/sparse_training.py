"""Training the kept weights of a program: what is trained, and the loop.

Weights are trained in float32, whatever they are stored in, and stay zero where they were pruned:
their gradient there is zero, and a step of Adam without gradients is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.facts import Mask
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program

Tensors = dict[str, torch.Tensor]
# The loss on one batch, under other parameters.
Loss = Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor]


class TrainedParameters:
    """Float32 copies of the parameters that are trained, and what is kept of each.

    Args:
        program: Gives the values to start from.
        masks: By linear; their weights are trained.
        vectors: Also train what is one-dimensional: biases, and gains of norms.
    """

    def __init__(self, program: Program, masks: Mapping[str, Mask], vectors: bool) -> None:
        self._dtypes: dict[str, torch.dtype] = {}
        self._keeps: Tensors = {}
        self.values: Tensors = {}
        for linear in find_linears(program):
            if linear.name not in masks:
                continue
            if linear.parameter not in self._keeps:
                self._add(program, linear.parameter)
                # Experts that have no mask stay as they are.
                self._keeps[linear.parameter] = torch.zeros(
                    self.values[linear.parameter].shape, dtype=torch.bool
                )
            linear.view(self._keeps[linear.parameter]).copy_(masks[linear.name].keep())
        for name in program.read_weights() if vectors else ():
            source = program.weights.source(name)
            if len(source.shape) == 1 and source.dtype.is_floating_point:
                self._add(program, name)

    def _add(self, program: Program, name: str) -> None:
        value = program.weights[name].detach()
        self._dtypes[name] = value.dtype
        self.values[name] = value.to(torch.float32, copy=True).requires_grad_()

    def rounded(self) -> Tensors:
        """The parameters in the types that they are stored in; gradients flow through."""
        return {name: value.to(self._dtypes[name]) for name, value in self.values.items()}

    def copied(self) -> Tensors:
        """Copies of the parameters in the types that they are stored in."""
        return {n: v.detach().to(self._dtypes[n], copy=True) for n, v in self.values.items()}

    def optimizer(self, learning_rate: float) -> torch.optim.Adam:
        """Adam; the steps of each parameter are relative to the size of its kept values."""
        groups = []
        for name, value in self.values.items():
            kept = value.detach()[self._keeps[name]] if name in self._keeps else value.detach()
            size = float(kept.square().mean().sqrt()) if kept.numel() else 0.0
            groups.append({"params": [value], "lr": learning_rate * (size or _SIZE_OF_ZEROS)})
        return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)

    def set_gradients(self, gradients: Sequence[torch.Tensor | None], share: float) -> None:
        """Adds a share of the gradients of one batch, in the order of `values`."""
        for (name, value), gradient in zip(self.values.items(), gradients, strict=True):
            if gradient is None:
                continue
            if name in self._keeps:
                gradient = gradient * self._keeps[name]
            scaled = gradient * share
            value.grad = scaled if value.grad is None else value.grad.add_(scaled)


# Biases that begin at zero have no size to be relative to.
_SIZE_OF_ZEROS = 1e-2


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs: Times that the training batches are seen.
        learning_rate: First step of Adam relative to the size of the weights; cosine to zero.
        batch: Calibration batches in one step.
        patience: Epochs without an improvement on the held-out batches before training ends.
        seed: Order of the batches.
    """

    epochs: int
    learning_rate: float
    batch: int
    patience: int
    seed: int


@dataclass(frozen=True, eq=False)
class Trained:
    """What training came to.

    Args:
        parameters: The best ones seen, in the types that they are stored in.
        before: Loss on the held-out batches before training.
        after: Loss on them with the best parameters; never above `before`.
        epochs: After how many epochs they were best; 0 when nothing was better than the start.
    """

    parameters: Tensors
    before: float
    after: float
    epochs: int


def train(
    parameters: TrainedParameters,
    loss: Loss,
    seen: Sequence[int],
    held_out: Sequence[int],
    schedule: Schedule,
) -> Trained:
    """Minimises a loss over batches; returns what was best on the held-out ones.

    Args:
        parameters: What is trained; it is left in its last state.
        loss: Of one batch under parameters.
        seen: Batches that are trained on.
        held_out: Batches that decide.
        schedule: How long and how fast.
    """

    def judged() -> float:
        with torch.no_grad():
            rounded = parameters.rounded()
            return sum(float(loss(i, rounded)) for i in held_out) / len(held_out)

    before = judged()
    best = Trained(parameters.copied(), before, before, 0)
    optimizer = parameters.optimizer(schedule.learning_rate)
    steps = schedule.epochs * math.ceil(len(seen) / schedule.batch)
    slowing = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
    generator = torch.Generator().manual_seed(schedule.seed)
    with torch.enable_grad():
        for epoch in range(1, schedule.epochs + 1):
            order = [seen[i] for i in torch.randperm(len(seen), generator=generator).tolist()]
            for start in range(0, len(order), schedule.batch):
                _step(parameters, loss, order[start : start + schedule.batch])
                optimizer.step()
                optimizer.zero_grad()
                slowing.step()
            now = judged()
            # NaN is not below anything: a run that diverged is never taken.
            if now < best.after:
                best = Trained(parameters.copied(), before, now, epoch)
            elif epoch - best.epochs >= schedule.patience or not math.isfinite(now):
                break
    return best


def _step(parameters: TrainedParameters, loss: Loss, batches: Sequence[int]) -> None:
    for index in batches:
        value = loss(index, parameters.rounded())
        gradients = torch.autograd.grad(value, list(parameters.values.values()), allow_unused=True)
        parameters.set_gradients(gradients, 1 / len(batches))


def _warm_cosine(steps: int) -> Callable[[int], float]:
    """Up within the first tenth of the steps, then down to zero along half a cosine.

    The first steps of Adam have the full size whatever the gradients are: without a slow start they
    undo what pruners and trainers before them did.
    """
    warm = max(steps // 10, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))

    return factor


def split(count: int, share: float) -> tuple[range, range]:
    """Which batches are trained on, and which decide: the last ones; a single batch does both."""
    held = min(max(math.ceil(share * count), 1), max(count - 1, 1))
    return range(max(count - held, 1)), range(min(count - held, count - 1), count)
