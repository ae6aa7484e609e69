"""How far the outputs of a whole program are from those it had before anything was pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import kl_div, log_softmax

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Roles
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.stage_error import run_with, token_error, token_index


class OutputDivergence:
    """Compares a program with its dense self, on its calibration batches, output by output.

    Outputs as wide as the vocabulary of an output head are logits: they are compared by
    KL(dense || program), in nats a token. Any other output is compared by the squared error of
    each token relative to its size. Padding does not count. The dense program runs each time: its
    logits for all batches would not fit into memory.

    Args:
        program: With calibration batches and `dense`.
    """

    def __init__(self, program: Program) -> None:
        if program.dense is None:
            raise RequirementError(
                "nothing knows what the dense program computes",
                next_step="put the pass in one list with the pruner",
            )
        self._program = program.loaded()
        self._dense = program.dense.loaded()
        heads = program.fact(Roles).heads
        self._widths = {n.out_features for n in find_linears(program) if n.name in heads}

    def __call__(self, index: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the divergence on one batch, float32, summed over outputs.

        Args:
            index: Of the batch.
            parameters: By name, in the dtype of the parameter; the others are as they were.
        """
        batch: Batch = self._program.calibration[index]
        batch = {name: batch[name] for name in self._program.inputs}
        wanted = self._dense.run(batch)
        found = run_with(self._program, batch, parameters)
        total = torch.zeros(())
        for name, value in found.items():
            if value.is_floating_point():
                tokens = token_index(self._program, batch, value)
                total = total + self._compare(value[tokens], wanted[name][tokens])
        return total

    def _compare(self, value: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if value.shape[-1] not in self._widths:
            return token_error(value, wanted)
        width = value.shape[-1]
        found = log_softmax(value.float().reshape(-1, width), -1)
        target = log_softmax(wanted.float().reshape(-1, width), -1)
        return kl_div(found, target, reduction="batchmean", log_target=True)
