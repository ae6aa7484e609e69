"""prune-alps: choose what to keep together with the values it will have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.admm import sparse_weight
from zeroskip.ir.errors import CompileError
from zeroskip.ir.linears import Linear
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.support_refinement import refine_on_support
from zeroskip.ir.weights import all_finite
from zeroskip.passes.updating_pruner import UpdatingPruner


@dataclass(frozen=True)
class PruneALPS(UpdatingPruner):
    """Minimises the output error of each linear over mask and kept weights at once.

    The error tr((W - D) G (W - D)^T), with G the Gram matrix of the inputs plus damping, is taken to
    columns of size 1 and minimised by ADMM; conjugate gradients then lower it further for the mask
    that was found. It ends no higher than for the weights of largest scaled magnitude left as they
    are.

    Weights of channels that are always zero are pruned first, and stay as they are where the
    pattern keeps them.

    Refuses statistics without Gram matrices, and a Gram matrix that overflowed.

    Args:
        damping: What is added to the diagonal of the Gram matrix, as a share of its mean.
        rho: The penalty of ADMM to start with.
        iterations: Of ADMM, at most; most linears need 30 to 100.
        cg_steps: Of conjugate gradients on the final mask.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact SparseWeights

    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
    Language Models", arXiv 2406.07831, section 3, with the schedule of the public code. Ours: the
    best iterate is taken and not the last, and inverses come from Cholesky factorisations.
    """

    damping: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    cg_steps: int = 10

    name = "prune-alps"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = {
            "damping": 0 <= self.damping < float("inf"),
            "rho": 1e-3 <= self.rho <= 1e3,
            "iterations": self.iterations >= 1,
            "cg_steps": self.cg_steps >= 0,
        }
        self._refuse_unless(problems)

    def prune(
        self, program: Program, linear: Linear, weight: torch.Tensor, pattern: SparsityPattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gram = program.fact(Statistics).gram_of(linear.name).float()
        if not all_finite(gram):
            raise CompileError(
                "the Gram matrix of its inputs overflows",
                where=linear.name,
                pass_name=self.name,
                next_step="look for extreme activations, or exclude it",
            )
        plain = pattern.project(weight.abs())
        energy = gram.diagonal().double()
        dead = energy <= 0
        if plain.all() or dead.all():
            return weight, plain
        scale = torch.where(dead, 1, energy + self.damping * energy.mean()).sqrt().float()
        gram = gram / scale / scale.unsqueeze(1)
        gram.diagonal().fill_(1)
        scaled = (weight * scale).masked_fill(dead, 0)
        size = scaled.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        scaled = scaled / size
        try:
            found, keep = sparse_weight(scaled, gram, pattern, self.rho, self.iterations)
        except CompileError as error:
            error.where = linear.name
            raise
        found = refine_on_support(scaled, keep, gram, found, self.cg_steps)
        return torch.where(dead, weight, found * size / scale), keep
