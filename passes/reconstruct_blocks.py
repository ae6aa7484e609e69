"""reconstruct-blocks: train the kept weights of each stage to give what the dense stage gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.program import Program
from zeroskip.ir.reconstruction import Reconstructed
from zeroskip.ir.stage_error import StageError
from zeroskip.passes.base import Scope
from zeroskip.passes.trainer import Trainer

LOSSES = ("token", "stage")
INPUTS = ("propagated", "dense", "both")


@dataclass(frozen=True)
class ReconstructBlocks(Trainer):
    """Trains the weights that pruning kept, so that a stage gives what it gave when it was dense.

    There are two streams of activations: a stage gets what comes out of the pruned and reconstructed
    stages before it, and is to give what the dense model gave there. Masks stay; weights are float32
    while they are trained, whatever they are stored in, by Adam with a cosine schedule.

    Some calibration batches are held out. What is kept is the state with the least error on them,
    rounded to the type that it is stored in; where no state is better than the start, the start. The
    fact `Reconstructed` has the errors before and after.

    Its place is behind `ApplyMasks`, or behind a pruner that updates weights, in the same run of
    layer-by-layer passes. It refuses a program that was pruned before and no longer knows its dense
    weights, and one without calibration data. For each stage it holds its weights four times in
    float32, and activations of two streams.

    Args:
        epochs: Times that the training batches are seen.
        learning_rate: First step of Adam, relative to the size (root mean square) of each parameter.
        batch: Calibration batches in one step.
        loss: `token`: the error of each token relative to its size; `stage`: of all tokens together,
            where the few tokens with enormous activations outweigh the others.
        inputs: What enters the stage in training: what the pruned stages before it give
            (`propagated`), what the dense ones gave (`dense`), or each in turn (`both`).
        vectors: Also train the biases and the gains of norms of the stage.
        held_out: Share of the batches that decide, at least one batch.
        patience: Epochs without an improvement on them before training ends.
        seed: Order of the batches.
        include: Patterns of linears, as for the pruner.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact SparseWeights

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Reconstructed
        fact SparseWeights

    Source: layer-wise reconstruction as in Li et al., BRECQ, arXiv 2102.05426, section 3.2, for
    masks instead of roundings; two streams as in OmniQuant, arXiv 2308.13137.
    """

    epochs: int = 4
    batch: int = 2
    loss: str = "token"
    inputs: str = "propagated"

    name = "reconstruct-blocks"
    provides = (Reconstructed,)
    outcomes = Reconstructed

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless({"loss": self.loss in LOSSES, "inputs": self.inputs in INPUTS})

    @property
    def scope(self) -> Scope:
        return "block"

    @property
    def uses_dense_outputs(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        super().check(program)
        if SparseWeights in program.facts and program.dense is None:
            raise RequirementError(
                "the program was pruned before, and nothing knows its dense weights",
                pass_name=self.name,
                next_step="put it in one list with the pruner, or keep Program.dense",
            )

    def run(self, program: Program) -> Program:
        masks = self._untrained(program)
        if not masks:
            return self._with_outcome(program, (), None)
        if program.dense is None and not program.dense_outputs:
            raise RequirementError(
                "nothing knows what the dense program computes",
                pass_name=self.name,
                next_step="put it in one list with the pruner",
            )
        has_dense_inputs = bool(program.dense_inputs)
        turns = 0
        with StageError(program, self.loss == "token") as error:

            def loss(index: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
                nonlocal turns
                dense = False
                # Only training takes turns: what counts in the end is what will enter the stage.
                if torch.is_grad_enabled() and has_dense_inputs:
                    turns += 1
                    dense = self.inputs == "dense" or (self.inputs == "both" and turns % 2 == 0)
                return error(index, values, dense)

            return self._trained(program, masks, loss)
