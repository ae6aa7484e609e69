"""How far the outputs of a program move when some of its parameters are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from zeroskip.ir.program import Batch, Program
from zeroskip.ir.streams import Stream


class StageError:
    """Compares a program with itself under other parameters, on its calibration batches.

    It is compared with its `dense_outputs` where it comes with them. Else what it computes is kept,
    in memory up to a budget, then on disk. Padding does not count. Gradients flow to the other parameters, and to nothing else: parameters of a live model
    are frozen here, and its gradients are never written. Use it as a context manager.

    Args:
        program: With calibration batches.
        budget: Bytes of outputs kept in memory.
    """

    def __init__(self, program: Program, budget: int = 2**30) -> None:
        self._program = program.loaded()
        self._outputs = Stream([{} for _ in program.calibration], budget)
        self._expected: Sequence[Batch] = program.dense_outputs or self._outputs
        if program.dense_outputs:
            return
        for index, batch in enumerate(program.calibration):
            self._outputs.write(index, self._program.run({n: batch[n] for n in program.inputs}))

    def __call__(self, index: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns ||outputs - expected||^2 / ||expected||^2 on one batch, float32, the mean over outputs.

        Args:
            index: Of the batch.
            parameters: By name, in the dtype of the parameter; the others are as they were.
        """
        program = self._program
        batch: Batch = program.calibration[index]
        runner = _Frozen(program, parameters)
        values = runner.run(*(batch[name] for name in program.inputs))
        total = torch.zeros(())
        count = 0
        for name, value in zip(program.outputs, values, strict=True):
            if value.is_floating_point():
                tokens = _tokens(program, batch, value)
                expected = self._expected[index][name][tokens].float()
                size = expected.square().sum().clamp(min=1e-30)
                total = total + (value[tokens].float() - expected).square().sum() / size
                count += 1
        return total / max(count, 1)

    def __enter__(self) -> StageError:
        return self

    def __exit__(self, *_: object) -> None:
        self._outputs.close()


def _tokens(program: Program, batch: Batch, value: torch.Tensor) -> Any:
    """An index of the entries of an output that are not padding."""
    for name in program.padding_masks:
        mask = batch[name].bool()
        if value.shape[: mask.dim()] == mask.shape:
            return mask
        if value.shape[0] == mask.numel():
            return mask.flatten()
    return ...


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
