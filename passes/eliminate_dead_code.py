"""eliminate-dead-code: drop what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from zeroskip.ir.program import Program
from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Removes operators and reads that no output depends on; inputs stay, they are the signature.

    Operators that write into a tensor are kept.

    Before::

        %0 = relu(x) : f32[s0, 8]
        %1 = neg(x) : f32[s0, 8]
        return output_0=%0

    After::

        %0 = relu(x) : f32[s0, 8]
        return output_0=%0
    """

    name = "eliminate-dead-code"

    def run(self, program: Program) -> Program:
        program.graph.eliminate_dead_code(_must_stay)
        program.graph_module.recompile()
        return program


def _must_stay(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)
