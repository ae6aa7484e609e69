"""materialize-elastic: a plain sparse program from an elastic one, at one sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.ir.elastic import Elastic
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scaled_linear import stacked_weights
from zeroskip.ir.statistics import ScoreMultipliers, Statistics
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class MaterializeElastic(Pass):
    """Merges the adapters of a sparsity into the weights and prunes them; nothing else remains.

    What comes out is a sparse program like any other: it is lowered and exported as if a pruner had
    made it. It needs no calibration data. At sparsity 0 nothing changes. Refuses a sparsity beyond
    what was trained, and one that no pattern of the family has.

    Args:
        sparsity: Share of weights to prune.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Elastic

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact SparseWeights

    Source: Xu et al., "Elastic Post-Training Sparsity", arXiv 2606.25285, deployment.
    """

    sparsity: float = 0.5

    name = "materialize-elastic"
    requires = (Elastic,)
    provides = (Masks, SparseWeights)
    invalidates = (Elastic, Statistics, ScoreMultipliers)
    lossy = True

    def __post_init__(self) -> None:
        number = isinstance(self.sparsity, (int, float))
        self._refuse_unless({"sparsity": number and 0 <= self.sparsity < 1})

    def check(self, program: Program) -> None:
        found = program.facts.get(Elastic)
        if isinstance(found, Elastic):
            self._check(found)

    def _check(self, elastic: Elastic) -> None:
        elastic.group(self.sparsity)
        if self.sparsity:
            elastic.pattern(self.sparsity)

    def run(self, program: Program) -> Program:
        elastic = program.fact(Elastic)
        if not self.sparsity or not elastic.linears:
            return program.with_fact(Masks(), SparseWeights())
        self._check(elastic)
        pattern = elastic.pattern(self.sparsity)
        known = program.facts.get(SparseWeights, SparseWeights())
        assert isinstance(known, SparseWeights)
        masks, weights = {}, []
        for linear in find_linears(program):
            if linear.name not in elastic.linears:
                continue
            before = known.masks.get(linear.name)
            if before is not None and (before.score, before.pattern) == (self.name, pattern):
                masks[linear.name] = before
                continue
            dense = linear.weight(program).detach()
            keep = elastic.keep(linear.name, dense, self.sparsity)
            weights.append((linear, elastic.weight(linear.name, dense, self.sparsity, keep)))
            masks[linear.name] = Mask(pack_bits(keep), linear.shape, pattern, self.name)
        if weights:
            program = program.with_weights(stacked_weights(program, weights))
        return program.with_fact(Masks(masks), SparseWeights(masks))
