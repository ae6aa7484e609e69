"""distill-outputs: train the kept weights of the whole program to give what the dense one gives."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.ir.distillation import OutputDivergence
from zeroskip.ir.program import Program
from zeroskip.ir.reconstruction import Distilled
from zeroskip.passes.trainer import Trainer


@dataclass(frozen=True)
class DistillOutputs(Trainer):
    """Trains the weights that pruning kept, all at once, on the outputs of the dense program.

    Logits are compared by KL(dense || sparse), in nats a token; outputs of a model without an
    output head by the squared error of each token relative to its size. Nothing but the calibration
    text is seen, and no labels. Masks stay. What is kept is the state with the least divergence on
    the held-out batches, rounded to the type that it is stored in; the start, where none is better.

    It repairs more than layer-by-layer passes can, because every weight sees what the others do; it
    costs a pass over the whole model, forward and back, for each batch of each epoch, and memory for
    five times the float32 weights and the activations of one batch. Layers that are first
    reconstructed one by one leave it less to do.

    Refuses a program that no longer knows its dense weights, and one without calibration data.

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

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact SparseWeights

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Distilled
        fact SparseWeights

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, eq. 1
    at temperature 1, of a model into its own sparse self.
    """

    epochs: int = 2
    learning_rate: float = 0.003
    patience: int = 1

    name = "distill-outputs"
    provides = (Distilled,)
    outcomes = Distilled

    def run(self, program: Program) -> Program:
        masks = self._untrained(program)
        if not masks:
            return self._with_outcome(program, (), None)
        return self._trained(program, masks, OutputDivergence(program))
