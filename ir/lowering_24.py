"""Linears as `zeroskip::linear_24` and back: those that read one input together as one product.

linear(x, A), linear(x, B)  ->  y = linear_24(x, [A; B]); y[..., :a], y[..., a:]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from zeroskip.ir.facts import Mask
from zeroskip.ir.input_groups import ARGUMENTS, bias_of, group_by_input, views_of
from zeroskip.ir.linears import Linear, LinearUse, find_linears, swaps_last_two
from zeroskip.ir.packing import LINEAR_24, FusedLinear, Fusion, Packing
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match
from zeroskip.ir.sources_24 import Codes24, Stacked, Values24, Weight24
from zeroskip.ir.weights import Source

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Packed24:
    """A weight of `zeroskip::linear_24`, and the parameters that it stands for.

    Args:
        packings: One for each linear that is computed, in the order of their rows.
        values: Of all.
        codes: Of all.
    """

    packings: tuple[Packing, ...]
    values: Source
    codes: Source

    @classmethod
    def of(cls, linears: Sequence[Linear], program: Program, masks: Mapping[str, Mask]) -> Packed24:
        """Packs linears of one width and dtype, each under its mask; nothing is loaded."""
        weights = tuple(
            Weight24(
                linear.name,
                program.weights.source(linear.parameter),
                masks[linear.name].bits,
                linear.transposed,
            )
            for linear in linears
        )
        packings = tuple(Packing(linear.parameter, linear.transposed) for linear in linears)
        return cls(packings, Values24(weights), Codes24(weights))

    @property
    def name(self) -> str:
        """What the names of its operands begin with."""
        first = self.packings[0].parameter
        return first if len(self.packings) == 1 else f"{first}_fused"


def lower_linears(program: Program, groups: Sequence[Packed24]) -> Program:
    """Rewrites linears to `zeroskip::linear_24`; the others stay as they are.

    Args:
        program: It is not changed.
        groups: What to rewrite them with; linears packed together pass `group_by_input` as one.
    """
    if not groups:
        return program
    lowering = _Lowering(program.fork())
    for packed in groups:
        lowering.lower(packed)
    return lowering.finish()


class _Lowering:
    """Rewrites one program, group by group."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._linears = {linear.parameter: linear for linear in find_linears(program)}
        self._added: dict[str, Source] = {}
        self._biases: dict[tuple[str, ...], str] = {}
        self._unread: set[str] = set()

    def lower(self, packed: Packed24) -> None:
        members = [self._linears[packing.parameter] for packing in packed.packings]
        for uses in zip(*(linear.uses for linear in members), strict=True):
            self._put(packed, members, uses)
        self._unread.update(linear.parameter for linear in members)

    def _put(
        self, packed: Packed24, members: Sequence[Linear], uses: tuple[LinearUse, ...]
    ) -> None:
        nodes = [use.node for use in uses]
        editor = Editor(self._program, Match(self._program, min(nodes), {}, frozenset(nodes)))
        x = nodes[0].args[ARGUMENTS[nodes[0].target][0]]  # It may have been rewritten just now.
        operands = [
            self._weight(editor, f"{packed.name}_values", packed.values),
            self._weight(editor, f"{packed.name}_codes", packed.codes),
        ]
        biases = [bias_of(use) for use in uses]
        if len(uses) == 1:
            product = editor.call(LINEAR_24, x, *operands, biases[0])
            product.meta["packing"] = packed.packings[0]
            self._replace(nodes[0], product)
            return
        names = tuple(str(bias.target) for bias in biases if bias is not None)
        bias = self._stacked(editor, names) if names else None
        product = editor.call(LINEAR_24, x, *operands, bias)
        last, first_row = product.meta["val"].dim() - 1, 0
        fused: list[FusedLinear] = []
        parts: list[fx.Node] = []
        for packing, linear, use in zip(packed.packings, members, uses, strict=True):
            end = first_row + linear.out_features
            name = names[len(fused)] if names else None
            fused.append(FusedLinear(packing, first_row, linear.out_features, name))
            parts.append(editor.call(aten.slice.Tensor, product, last, first_row, end))
            # Rows of a slice lie apart, so that dimensions may not merge without a copy.
            for user in views_of(use.node):
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
            first_row = end
        for node, part in zip(nodes, parts, strict=True):
            self._replace(node, part)
        product.meta["packing"] = Fusion(tuple(fused))

    def _weight(self, editor: Editor, name: str, source: Source) -> fx.Node:
        self._added[name] = source
        return editor.weight(name, source)

    def _stacked(self, editor: Editor, names: tuple[str, ...]) -> fx.Node:
        if names not in self._biases:
            name = f"{names[0]}_fused"
            while name in self._added:  # The same first one stands before others elsewhere.
                name += "_again"
            self._biases[names] = name
            self._unread.update(names)
        sources = [self._program.weights.source(name) for name in names]
        name = self._biases[names]
        return self._weight(editor, name, self._added.get(name) or Stacked(sources))

    def _replace(self, node: fx.Node, product: fx.Node) -> None:
        node.replace_all_uses_with(product)
        self._program.graph.erase_node(node)

    def finish(self) -> Program:
        drop_unread(self._program, self._unread)
        weights = self._program.weights.replace(self._added)
        return dataclasses.replace(self._program, weights=weights, level="lowered")


def lower_alike(program: Program, other: Program) -> Program:
    """Lowers another capture of the same model, such as one with a cache, as the first was.

    Args:
        program: A program whose linears `lower_linears` lowered.
        other: Reads the same weights under the same names; it may be returned as it is. Linears
            that are one product in the first and read different inputs here stay as they are.
    """
    groups: dict[str, Packed24] = {}
    for node in program.graph.find_nodes(op="call_function", target=LINEAR_24):
        packing = node.meta.get("packing")
        if packing is None:
            continue
        packings = (
            tuple(linear.packing for linear in packing.linears)
            if isinstance(packing, Fusion)
            else (packing,)
        )
        values, codes = (str(operand.target) for operand in node.args[1:3])
        groups[values] = Packed24(
            packings, program.weights.source(values), program.weights.source(codes)
        )
    linears = {n.parameter: n for n in find_linears(other) if n.uses[0].node.target in ARGUMENTS}
    alike = []
    for packed in groups.values():
        members = [linears[p.parameter] for p in packed.packings if p.parameter in linears]
        whole = len(members) == len(packed.packings)
        if whole and (len(members) == 1 or len(group_by_input(members, other)) == 1):
            alike.append(packed)
    return lower_linears(other, alike)


def restore_linears(program: Program) -> Program:
    """Returns a program with `aten.linear` on the dense parameters in place of each `linear_24`.

    The inverse of `lower_linears`, for what reads parameters by name. Products that do not say
    which parameters they stand for stay.
    """
    restored = program.fork()
    for node in restored.graph.find_nodes(op="call_function", target=LINEAR_24):
        packing = node.meta.get("packing")
        fused = packing.linears if isinstance(packing, Fusion) else ()
        if isinstance(packing, Packing):
            bias = node.args[3]
            name = str(bias.target) if isinstance(bias, fx.Node) else None
            _restore(restored, node, node, packing, name)
        slices = {user.args[2]: user for user in list(node.users)}
        for each in fused:
            if each.first_row in slices:
                _restore(restored, node, slices[each.first_row], each.packing, each.bias)
        if packing is not None:
            restored.graph.erase_node(node)
    drop_unread(restored, {str(n.target) for n in restored.graph.find_nodes(op="get_attr")})
    return restored


def _restore(
    program: Program, node: fx.Node, part: fx.Node, packing: Packing, bias: str | None
) -> None:
    editor = Editor(program, Match(program, node, {}, frozenset({node})))
    weight = editor.weight(packing.parameter, program.weights.source(packing.parameter))
    if packing.transposed:
        weight = editor.call(aten.t.default, weight)
    added = None if bias is None else editor.weight(bias, program.weights.source(bias))
    part.replace_all_uses_with(editor.call(aten.linear.default, node.args[0], weight, added))
    if part is not node:
        program.graph.erase_node(part)


def drop_unread(program: Program, names: set[str]) -> None:
    """Erases what only led from these parameters to a linear, so that they are not loaded."""
    for read in program.graph.find_nodes(op="get_attr"):
        if read.target not in names:
            continue
        chain = [read]
        while (
            len(chain[-1].users) == 1
            and swaps_last_two(user := next(iter(chain[-1].users))) is not None
        ):
            chain.append(user)
        if not chain[-1].users:
            for node in reversed(chain):
                program.graph.erase_node(node)
    program.graph_module.recompile()
