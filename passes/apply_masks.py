"""apply-masks: set to zero what the masks do not keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import find_linears, masked_sources
from zeroskip.ir.program import Program
from zeroskip.ir.pruning_error import output_error
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers, Statistics
from zeroskip.ir.weights import is_zero_outside, zero_outside
from zeroskip.passes.base import Pass, Scope


@dataclass(frozen=True)
class ApplyMasks(Pass):
    """Makes the decision of a pruner true: W becomes W where the mask is set, and zero elsewhere.

    The kept weights stay bit for bit what they were. The zeros are held as a mask over the old
    weight until someone asks for the tensor, so that this costs 1/32 of the weights' memory.
    Statistics, and what was learned from them, are dropped: what comes out of a pruned linear is no
    longer what was observed.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact SparseWeights
    """

    name = "apply-masks"
    requires = (Masks,)
    provides = (SparseWeights,)
    invalidates = (Statistics, ScoreMultipliers)
    lossy = True

    @property
    def scope(self) -> Scope:
        return "block"

    def targets(self, program: Program) -> frozenset[str] | None:
        known = program.facts.get(Masks, Masks())
        assert isinstance(known, Masks)
        return frozenset(known.masks)

    def run(self, program: Program) -> Program:
        masks = dict(program.fact(Masks).masks)
        statistics = program.facts.get(Statistics, Statistics())
        assert isinstance(statistics, Statistics)
        keeps = {}
        for linear in find_linears(program):
            if linear.name in masks:
                keep = masks[linear.name].keep()
                weight = linear.weight(program)
                if not is_zero_outside(weight, keep):
                    keeps[linear.name] = keep
                    masks[linear.name] = _judged(
                        masks[linear.name], weight, keep, statistics.edges.get(linear.name)
                    )
        if keeps:
            program = program.with_weights(masked_sources(program, keeps))
        known = program.facts.get(SparseWeights, SparseWeights())
        assert isinstance(known, SparseWeights)
        # A mask that is in force already is known with what it cost.
        masks = {
            name: known.masks[name] if mask.same_as(known.masks.get(name)) else mask
            for name, mask in masks.items()
        }
        return program.with_fact(known.merge(SparseWeights(masks)))


def _judged(
    mask: Mask, weight: torch.Tensor, keep: torch.Tensor, edge: EdgeStatistics | None
) -> Mask:
    """The mask with what it does to the output, as far as its inputs were seen."""
    if edge is None or not edge.count:
        return mask
    return replace(mask, error=output_error(weight, zero_outside(weight, keep), edge))
