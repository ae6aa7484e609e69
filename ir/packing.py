"""Which parameters a product with packed operands stands for: the operands themselves do not tell.

It is kept in `node.meta["packing"]`: a `Packing`, or a `Fusion` where one product computes several
linears that read the same input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import zeroskip.ir.linear_24
import zeroskip.ir.ops  # noqa: F401  (registers the operators)
from zeroskip.ir.program import Program

LINEAR_24 = torch.ops.zeroskip.linear_24.default
SPARSE_LINEAR = torch.ops.zeroskip.sparse_linear.default


@dataclass(frozen=True)
class Packing:
    """The parameter that the packed operands of one product stand for, as it is stored."""

    parameter: str
    transposed: bool


@dataclass(frozen=True)
class FusedLinear:
    """One linear of a fused product.

    Args:
        packing: Its parameter.
        first_row: Where its rows begin among those of the product.
        rows: How many they are.
        bias: The parameter that is added to it; None for none.
    """

    packing: Packing
    first_row: int
    rows: int
    bias: str | None


@dataclass(frozen=True)
class Fusion:
    """The linears that one product computes, one below the other; slices of it are their results."""

    linears: tuple[FusedLinear, ...]


def packed_parameters(node: fx.Node) -> tuple[str, ...]:
    """Returns the parameters that a node computes with and that it does not read, biases included."""
    packing = node.meta.get("packing")
    if isinstance(packing, Fusion):
        weights = [linear.packing.parameter for linear in packing.linears]
        return (*weights, *(linear.bias for linear in packing.linears if linear.bias))
    return (packing.parameter,) if isinstance(packing, Packing) else ()


def packed_names(program: Program) -> frozenset[str]:
    """Names of the weights that hold packed operands, which no model has as parameters."""
    operands: list[object] = []
    for node in program.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        operands += node.args[1:5]
    for node in program.graph.find_nodes(op="call_function", target=LINEAR_24):
        packing = node.meta.get("packing")
        # A linear_24 of the model itself reads parameters of its own.
        if packing is not None:
            operands += node.args[1:4] if isinstance(packing, Fusion) else node.args[1:3]
    return frozenset(str(n.target) for n in operands if isinstance(n, fx.Node))
