"""How far the outputs of a whole program are from those it had before anything was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Roles
from zeroskip.ir.linears import find_linears
from zeroskip.ir.partition import Stage, find_stages
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.stage_error import run_with, token_error, token_index
from zeroskip.ir.stages import extract_stage


class OutputDivergence:
    """Compares a program with its dense self, on its calibration batches, output by output.

    Outputs as wide as the vocabulary of an output head are logits: they are compared by
    KL(dense || program), in nats a token. Any other output is compared by the squared error of
    each token relative to its size. Padding does not count. The logits of all batches would not fit
    into memory, but what enters the last stage of the dense program does: it is remembered, so that
    only that stage, the output head of a language model, runs more than once for a batch.

    Args:
        program: With calibration batches and `dense`.
        budget: Bytes that are remembered; for batches beyond it the dense program runs each time.
    """

    def __init__(self, program: Program, budget: int = 2**30) -> None:
        if program.dense is None:
            raise RequirementError(
                "nothing knows what the dense program computes",
                next_step="put the pass in one list with the pruner",
            )
        self._program = program.loaded()
        self._dense = _InTwoParts(program.dense, budget)
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
        wanted = self._dense.run(index, batch)
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


class _InTwoParts:
    """Runs a program in two parts, the second of which is its last stage; remembers what is between."""

    def __init__(self, program: Program, budget: int) -> None:
        self._program = program.loaded()
        self._budget = budget
        self._between: dict[int, Batch] = {}
        self._parts: tuple[Program, Program] | None = None
        *before, last = find_stages(program)
        returned = program.graph.output_node().all_input_nodes
        if not before or not set(returned) <= set(last.outputs):
            return
        nodes = tuple(node for stage in before for node in stage.nodes)
        first = Stage("first", nodes, (), last.inputs, ())
        self._names = dict(zip(program.outputs, _names(program), strict=True))
        self._parts = (
            extract_stage(self._program, first, ()),
            extract_stage(self._program, last, ()),
        )

    def run(self, index: int, batch: Batch) -> Batch:
        """Returns the outputs of the whole program on a batch, which is always the same for an index."""
        if self._parts is None:
            return self._program.run(batch)
        first, last = self._parts
        between = self._between.get(index)
        if between is None:
            between = first.run({name: batch[name] for name in first.inputs})
            size = sum(value.nbytes for value in between.values())
            if size <= self._budget:
                self._budget -= size
                self._between[index] = between
        entering = {**batch, **between}
        found = last.run({name: entering[name] for name in last.inputs})
        return {output: found[name] for output, name in self._names.items()}


def _names(program: Program) -> list[str]:
    """The names of the nodes that a program returns, in order."""
    returned: Any = program.graph.output_node().args[0]
    return [node.name for node in returned]
