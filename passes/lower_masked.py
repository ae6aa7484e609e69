"""lower-masked: linear(x, W) with a pruned W becomes masked_linear(x, W, mask)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from zeroskip.ir.facts import Lowered, Mask, SparseWeights
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match, RewriteRule, apply_rules
from zeroskip.ir.weights import pack_bits
from zeroskip.passes.base import Pass

aten = torch.ops.aten
_TARGET = torch.ops.zeroskip.masked_linear.default


@dataclass(frozen=True)
class LowerMasked(Pass):
    """Rewrites every pruned linear to `zeroskip::masked_linear`, with the mask as packed bits.

    The mask becomes a buffer beside the weight, so that it can be swapped or trained around without
    capturing again. This form computes what the dense one does; it is not faster. `addmm` (Conv1D)
    and transposed `matmul` are rewritten too.

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
        weight = w if not _in_out(editor.match.root) else editor.call(aten.t.default, w)
        keep = masks[linear.name].keep()
        bits = editor.constant(f"{linear.parameter}_mask", pack_bits(keep))
        return editor.call(_TARGET, x, weight, bits, b)

    spellings: list[tuple[str, Callable[..., object]]] = [
        ("linear(x, w) = masked(x, w)", lambda x, w: aten.linear.default(x, w)),
        ("linear(x, w, b) = masked(x, w, b)", lambda x, w, b: aten.linear.default(x, w, b)),
        ("addmm(b, x, w) = masked(x, w^T, b)", lambda x, w, b: aten.addmm.default(b, x, w)),
        ("matmul(x, w) = masked(x, w^T)", lambda x, w: aten.matmul.default(x, w)),
        ("mm(x, w) = masked(x, w^T)", lambda x, w: aten.mm.default(x, w)),
    ]
    return [RewriteRule(name, pattern, put, check) for name, pattern in spellings]


def _in_out(node: fx.Node) -> bool:
    """Whether the operator multiplies by its weight argument as it stands, [in, out]."""
    return node.target is not aten.linear.default
