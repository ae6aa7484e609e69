"""lower-masked: linear(x, W) with a pruned W becomes masked_linear(x, W, mask)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from zeroskip.ir.facts import Lowered, Mask, SparseWeights
from zeroskip.ir.linears import Linear, find_linears, linear_rules
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match, RewriteRule, apply_rules
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Pass
from zeroskip.runtime.kernels import bitmap_linear as _bitmap_kernels  # noqa: F401  (registers them)
from zeroskip.runtime.kernels import masked_linear as _kernels  # noqa: F401  (registers them)

aten = torch.ops.aten
_TARGET = torch.ops.zeroskip.masked_linear.default


@dataclass(frozen=True)
class LowerMasked(Pass):
    """Rewrites every pruned linear to `zeroskip::masked_linear`, with the mask as packed bits.

    The mask becomes a buffer beside the weight, so that it can be swapped or trained around without
    capturing again. This form computes what the dense one does; it is not faster. On a CUDA device a
    Triton kernel reads weight and bits for few tokens, without writing the masked weight. `addmm`
    (Conv1D) and transposed `matmul` are rewritten too.

    Refuses, and leaves as it is, a linear whose weight is 3-D (experts) or has no mask; the fact
    `Lowered` says which and why.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact SparseWeights

    After::

        %2 = zeroskip.masked_linear(%1, @fc.weight, @fc.weight_mask, @fc.bias) : f32[s0, 8]
        fact Lowered
        fact SparseWeights
    """

    name = "lower-masked"
    requires = (SparseWeights,)
    provides = (Lowered,)

    def run(self, program: Program) -> Program:
        linears = {u.node.name: linear for linear in find_linears(program) for u in linear.uses}
        masks = program.fact(SparseWeights).masks
        lowered, count, _ = apply_rules(program, _rules(linears, masks))
        known = program.facts.get(Lowered, Lowered())
        assert isinstance(known, Lowered)
        if count:
            program = dataclasses.replace(lowered, level="lowered")
        operators, refusals = {}, {}
        for linear in find_linears(program):
            if all(use.node.target is _TARGET for use in linear.uses):
                operators[linear.name] = "zeroskip::masked_linear"
            else:
                refusals[linear.name] = _refusal(linear, masks) or "no rule knows its operator"
        return program.with_fact(known.merge(Lowered(operators, refusals)))


def _refusal(linear: Linear, masks: Mapping[str, Mask]) -> str | None:
    if linear.expert is not None:
        return "its weight is 3-D, one matrix for each expert"
    if linear.name not in masks:
        return "it is not pruned"
    return None


def _rules(linears: dict[str, Linear], masks: Mapping[str, Mask]) -> list[RewriteRule]:
    def check(match: Match) -> str | None:
        linear = linears.get(match.root.name)
        if linear is None:
            return "multiplies by something that is not a parameter"
        return _refusal(linear, masks)

    def put(editor: Editor, x: fx.Node, w: fx.Node, b: fx.Node | None = None) -> fx.Node:
        linear = linears[editor.match.root.name]
        # All operators but `linear` multiply by their weight argument as it stands, [in, out].
        in_out = editor.match.root.target is not aten.linear.default
        weight = editor.call(aten.t.default, w) if in_out else w
        keep = masks[linear.name].keep()
        bits = editor.constant(f"{linear.parameter}_mask", pack_bits(keep))
        return editor.call(_TARGET, x, weight, bits, b)

    return linear_rules("masked_linear", put, check)
