"""How far the outputs of a program move when some of its parameters are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from zeroskip.ir.program import Batch, Program
from zeroskip.ir.streams import Stream


class StageError:
    """Compares a program with what it is to compute, under other parameters, on its calibration batches.

    It is compared with its `dense_outputs` where it comes with them. Else with what it computes
    itself, or computed before anything was pruned; that is kept in memory up to a budget, then on
    disk. Padding does not count. Gradients flow to the other parameters, and to nothing else:
    parameters of a live model are frozen here, and its gradients are never written. Use it as a
    context manager.

    Args:
        program: With calibration batches.
        by_token: Each token's error is relative to its own size, so that the few tokens with
            enormous activations, which most decoders have, do not outweigh all others.
        budget: Bytes of outputs kept in memory.
    """

    def __init__(self, program: Program, by_token: bool = False, budget: int = 2**30) -> None:
        self._program = program.loaded()
        self._by_token = by_token
        self._outputs = Stream([{} for _ in program.calibration], budget)
        self._expected: Sequence[Batch] = program.dense_outputs or self._outputs
        if program.dense_outputs:
            return
        wanted = (program.dense or program).loaded()
        for index, batch in enumerate(program.calibration):
            self._outputs.write(index, wanted.run({n: batch[n] for n in program.inputs}))

    def __call__(
        self, index: int, parameters: Mapping[str, torch.Tensor], dense_inputs: bool = False
    ) -> torch.Tensor:
        """Returns the squared error relative to ||expected||^2 on one batch, float32, the mean over outputs.

        Args:
            index: Of the batch.
            parameters: By name, in the dtype of the parameter; the others are as they were.
            dense_inputs: Run on what entered the stage before anything was pruned.
        """
        program = self._program
        batch: Batch = program.calibration[index]
        entering = program.dense_inputs[index] if dense_inputs else batch
        found = run_with(program, entering, parameters)
        errors = [
            self._error(value, self._expected[index][name], program, batch)
            for name, value in found.items()
            if value.is_floating_point()
        ]
        return torch.stack(errors).mean() if errors else torch.zeros(())

    def _error(
        self, value: torch.Tensor, expected: torch.Tensor, program: Program, batch: Batch
    ) -> torch.Tensor:
        tokens = token_index(program, batch, value)
        if self._by_token:
            return token_error(value[tokens], expected[tokens])
        wanted = expected[tokens].float()
        squares = (value[tokens].float() - wanted).square()
        return squares.sum() / wanted.square().sum().clamp(min=1e-30)

    def __enter__(self) -> StageError:
        return self

    def __exit__(self, *_: object) -> None:
        self._outputs.close()


def token_error(value: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns the squared error of each token relative to its size, the mean over tokens.

    Args:
        value: [..., channels].
        wanted: The same.
    """
    wanted = wanted.float()
    squares = (value.float() - wanted).square().sum(-1)
    sizes = wanted.square().sum(-1)
    # A token whose output is next to nothing is held to a part of the average size.
    floor = 1e-6 * sizes.mean() + 1e-30
    return (squares / (sizes + floor)).mean()


def token_index(program: Program, batch: Batch, value: torch.Tensor) -> Any:
    """An index of the entries of an output that are not padding."""
    for name in program.padding_masks:
        mask = batch[name].bool()
        if value.shape[: mask.dim()] == mask.shape:
            return mask
        if value.shape[0] == mask.numel():
            return mask.flatten()
    return ...


def run_with(
    program: Program, batch: Batch, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Runs a program under other parameters, which alone receive gradients.

    Args:
        program: Its weights should be loaded.
        batch: A tensor for every placeholder.
        parameters: By name, in the dtype of the parameter; the others are as they were.
    """
    values = _Frozen(program, parameters).run(*(batch[name] for name in program.inputs))
    return dict(zip(program.outputs, values, strict=True))


class _Frozen(fx.Interpreter):
    """Runs a graph with gradients, which only the parameters given receive."""

    def __init__(self, program: Program, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__(program.graph_module)
        self._weights = program.weights
        self._parameters = parameters
        self.extra_traceback = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._parameters:
            return self._parameters[target]
        if target in self._weights:
            return self._weights[target].detach()
        return super().get_attr(target, args, kwargs)
