"""fold-constants: compute once what depends on no input and no parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from zeroskip.ir.program import Program, attribute
from zeroskip.ir.rewrite import Editor, Match
from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces an expression over buffers and literals by its value.

    Expressions over parameters stay: parameters are what other passes and checkpoints know by name.
    Results larger than `limit` elements stay too, and so does anything random or in place.

    Args:
        limit: Largest number of elements of a folded value.

    Before::

        %0 = cos(@inv_freq) : f32[8]
        %1 = mul(x, %0) : f32[s0, 8]

    After::

        %0 = mul(x, @folded_0) : f32[s0, 8]
    """

    limit: int = 1 << 20

    name = "fold-constants"

    def run(self, program: Program) -> Program:
        values: dict[fx.Node, torch.Tensor] = {}
        written = _written(program.graph)
        for node in program.graph.nodes:
            value = None if node in written else self._evaluate(program, node, values)
            if value is not None:
                values[node] = value
        taken = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
        number = 0
        for node in [n for n in values if n.op == "call_function"]:
            if all(user in values for user in node.users):
                continue  # Only the last of a chain is read by what remains.
            while f"folded_{number}" in taken:
                number += 1
            taken.add(f"folded_{number}")
            match = Match(program, node, {}, frozenset({node}))
            constant = Editor(program, match).constant(f"folded_{number}", values[node])
            constant.meta = {**node.meta}
            node.replace_all_uses_with(constant, lambda user: user not in values)
        for node in reversed([n for n in values if n.op == "call_function"]):
            if not node.users:
                program.graph.erase_node(node)
        program.graph_module.recompile()
        return program

    def _evaluate(
        self, program: Program, node: fx.Node, values: dict[fx.Node, torch.Tensor]
    ) -> torch.Tensor | None:
        if node.op == "get_attr" and node.target not in program.weights:
            held = attribute(program.graph_module, str(node.target))
            return held if isinstance(held, torch.Tensor) else None
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            return None
        expected = node.meta.get("val")
        if not isinstance(expected, torch.Tensor) or any(
            not isinstance(size, int) for size in expected.shape
        ):
            return None
        if expected.numel() > self.limit or any(i not in values for i in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result.clone() if isinstance(result, torch.Tensor) else None


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Returns what operators write into: their first argument, and all that it may be a view of."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        while node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            written.add(node)
    return written
