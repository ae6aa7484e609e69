"""prune-sparsegpt: choose masks column by column; the columns after make up for what is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.facts import Mask, Masks
from zeroskip.ir.input_divisors import input_divisors
from zeroskip.ir.linears import Linear
from zeroskip.ir.optimal_surgery import HessianRoot, hessian_root, prune_columns
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.updating_pruner import UpdatingPruner


@dataclass(frozen=True)
class PruneSparseGPT(UpdatingPruner):
    """Prunes from the first input channel to the last, and updates the weights still to come.

    With H = sum x x^T + damping and U the upper Cholesky factor of H^-1, a weight costs
    w^2 / U_jj^2, and when it goes, the weights after it in its row take over: w -= w_j / U_jj U_j.
    N:M groups are chosen from weights that have taken over all before them; elsewhere the weights
    of `block_size` columns compete. "50%" prunes as many weights of each row in all columns alike,
    "50% matrix" lets all rows compete, as published. Counts are exact.

    Refuses a linear without a Gram matrix (`Observe(gram=True)`), one whose Gram matrix cannot be
    factorised whatever the damping, weights that hold NaN or inf, and comparison across linears.

    Args:
        block_size: Columns whose weights compete. A group or block that is wider is never cut.
        damping: Share of the mean of H's diagonal that is added to it. Where that is too little to
            factorise H, it is raised tenfold, up to 1. Of inputs that were divided by folded scales
            it is what was added before, so folding changes nothing.
        preserve_mask: Take the masks that are known and update the weights only; `pattern` is then
            not looked at.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact SparseWeights

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", arXiv 2301.00774, algorithm 1 and sections 3.2 to 3.4.
    """

    block_size: int = 128
    damping: float = 0.01
    preserve_mask: bool = False

    name = "prune-sparsegpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = {"block_size": self.block_size >= 1, "damping": 0 <= self.damping <= 1}
        self._refuse_unless(problems)

    @property
    def ignores_input_scales(self) -> bool:
        """H shrinks with its inputs, and damping with it: `hessian_root`."""
        pattern = parse_pattern(self.pattern)
        by_row = isinstance(pattern, NM) or (
            isinstance(pattern, Unstructured) and pattern.comparison == "row"
        )
        return by_row or self.preserve_mask

    def run(self, program: Program) -> Program:
        if self.preserve_mask and Masks not in program.facts:
            raise RequirementError(
                f"{self.name} with preserve_mask needs Masks",
                pass_name=self.name,
                next_step="put a pruner that chooses masks, such as prune-wanda, before it",
            )
        try:
            return super().run(program)
        finally:
            _root_of.cache_clear()

    def pattern_of(self, program: Program, linear: Linear) -> SparsityPattern:
        if self.preserve_mask:
            return self._known_mask(program, linear).pattern
        return super().pattern_of(program, linear)

    def is_done(
        self, program: Program, linear: Linear, pattern: SparsityPattern, before: Mask
    ) -> bool:
        if self.preserve_mask:
            return before.score == self.name and before.same_as(self._known_mask(program, linear))
        return super().is_done(program, linear, pattern, before)

    def keep_unseen(
        self, program: Program, linear: Linear, weight: torch.Tensor, pattern: SparsityPattern
    ) -> torch.Tensor:
        if self.preserve_mask:
            return self._known_mask(program, linear).keep()
        return super().keep_unseen(program, linear, weight, pattern)

    def prune(
        self, program: Program, linear: Linear, weight: torch.Tensor, pattern: SparsityPattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._known_mask(program, linear).keep() if self.preserve_mask else None
        gram = program.fact(Statistics).gram_of(linear.name)
        try:
            divisors = input_divisors(program, linear.name)
            key = None if divisors is None else divisors.numpy().tobytes()
            root = _root_of(gram, self.damping, key)
        except CompileError as error:
            error.where = linear.name
            raise
        return prune_columns(weight, root, pattern if known is None else known, self.block_size)

    def _known_mask(self, program: Program, linear: Linear) -> Mask:
        mask = program.fact(Masks).masks.get(linear.name)
        if mask is None:
            raise RequirementError(
                "there is no mask of this linear to preserve",
                where=linear.name,
                pass_name=self.name,
                next_step=f"give the pruner before {self.name} the same include and exclude",
            )
        return mask


@lru_cache(maxsize=1)
def _root_of(gram: torch.Tensor, damping: float, divisors: bytes | None) -> HessianRoot:
    """Factorises once for linears that share an input, which share one Gram matrix."""
    if divisors is None:
        return hessian_root(gram, damping)
    return hessian_root(gram, damping, torch.frombuffer(bytearray(divisors), dtype=torch.float64))
