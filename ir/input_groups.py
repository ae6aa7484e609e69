"""Linears that read the same input, so that one product can compute them: found from the graph alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from zeroskip.ir.dataflow import is_view
from zeroskip.ir.linears import Linear, LinearUse
from zeroskip.ir.program import Program

aten = torch.ops.aten
# Where each operator that can be packed takes its activation and its bias.
ARGUMENTS: dict[Any, tuple[int, int | None]] = {
    aten.linear.default: (0, 2),
    aten.addmm.default: (1, 0),
    aten.mm.default: (0, None),
    aten.matmul.default: (0, None),
}


def refusal_to_lower(linear: Linear, program: Program) -> str | None:
    """Returns why no `linear_24` can take the place of a linear, or None; the weight is not looked at."""
    dtype = program.weights.source(linear.parameter).dtype
    for use in linear.uses:
        if use.node.target not in ARGUMENTS or use.node.kwargs:
            return f"{use.node.target} has no form with packed operands"
        given = use.activation.meta["val"].dtype
        if given != dtype:
            return f"its input is {given}, its weight {dtype}"
        bias = bias_of(use)
        shape = None if bias is None else tuple(bias.meta["val"].shape)
        if shape not in (None, (linear.out_features,)):
            return f"what it adds is {shape}, not one number for each of {linear.out_features} rows"
    return None


def group_by_input(linears: Iterable[Linear], program: Program) -> list[tuple[Linear, ...]]:
    """Groups linears that can be one product, in the order given.

    They have the same inputs at every use, weights of one dtype, and all a bias or none.
    """
    groups: dict[object, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(_shared_inputs(linear, program) or linear.name, []).append(linear)
    return [tuple(group) for group in groups.values()]


def _shared_inputs(linear: Linear, program: Program) -> object | None:
    """What linears of a group have in common; None for one that has to stay alone."""
    inputs, has_bias = [], []
    for use in linear.uses:
        bias = bias_of(use)
        if bias is not None and (bias.op != "get_attr" or bias.target not in program.weights):
            return None  # The graph computes it: it cannot be packed with others.
        if any(_writes(user) for user in use.activation.users) or not _can_be_slice(use.product):
            return None
        inputs.append(use.activation)
        has_bias.append(bias is not None)
    return tuple(inputs), tuple(has_bias), program.weights.source(linear.parameter).dtype


def bias_of(use: LinearUse) -> fx.Node | None:
    """Returns what the operator adds; what its only reader adds is not looked for."""
    at = ARGUMENTS[use.node.target][1]
    found = use.node.args[at] if at is not None and len(use.node.args) > at else None
    return found if isinstance(found, fx.Node) else None


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes a tensor: those before and after it do not read the same."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _can_be_slice(product: fx.Node) -> bool:
    """Whether a value may lie in a larger tensor: nobody counts on its strides."""
    return all(user.target is not aten.as_strided.default for user in views_of(product))


def views_of(value: fx.Node) -> list[fx.Node]:
    """Returns what reads a value, and what reads its views."""
    found: list[fx.Node] = []
    queue = [value]
    while queue:
        users = [user for user in queue.pop().users if user.op == "call_function"]
        found += users
        queue += [user for user in users if is_view(user)]
    return found
