"""The biases of linears: where they are, what was added to them, and how one is added.

A bias that is added becomes a weight of the Program, named as the module that holds the linear would
name it; the module itself gets it later, see `zeroskip.ir.added_parameters`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from zeroskip.ir.facts import Fact, Mask
from zeroskip.ir.linears import Linear, LinearUse, find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match
from zeroskip.ir.weights import InMemory, Source

aten = torch.ops.aten

# Where each operator takes a bias; those of None are followed by a sum.
_BIAS_ARGUMENT: dict[Any, int | None] = {
    aten.linear.default: 2,
    aten.addmm.default: 0,
    aten.mm.default: None,
    aten.matmul.default: None,
    torch.ops.zeroskip.masked_linear.default: 3,
    torch.ops.zeroskip.sparse_linear.default: 5,
    torch.ops.zeroskip.linear_24.default: 3,
}
# Without a bias, these can be given one.
_EXTENDABLE = (aten.linear.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True, eq=False)
class BiasShift:
    """What was added to the biases of one linear.

    Args:
        mask: The mask that it makes up for.
        shift: What it makes up for it by, float64 [out].
        biases: The parameters that it was added to, one for each module that uses the weight.
        added: Whether there was no bias before.
    """

    mask: Mask
    shift: torch.Tensor
    biases: tuple[str, ...]
    added: bool


@dataclass(frozen=True, eq=False)
class ShiftedBiases(Fact):
    """Which biases make up for the mean of what pruning takes away, and which linears have none.

    Args:
        shifts: By linear.
        refusals: By linear, why it was left as it is.
    """

    shifts: Mapping[str, BiasShift] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        linears = {linear.name: linear for linear in find_linears(program)}
        for name, shifted in self.shifts.items():
            if name not in linears:
                return f"the bias of {name} is said to be shifted, and it is not a linear"
            for use in linears[name].uses:
                bias = find_bias(use, program)
                if bias not in shifted.biases:
                    return f"{use.node.name} is said to add a shifted bias, and adds {bias}"
        return None

    def restrict(self, linears: Iterable[str]) -> ShiftedBiases:
        names = set(linears)
        return ShiftedBiases(
            {n: s for n, s in self.shifts.items() if n in names},
            {n: r for n, r in self.refusals.items() if n in names},
        )

    def merge(self, other: ShiftedBiases) -> ShiftedBiases:
        # A linear that was refused once may have been shifted since.
        refusals = {**self.refusals, **other.refusals}
        shifts = {**self.shifts, **other.shifts}
        return ShiftedBiases(shifts, {n: r for n, r in refusals.items() if n not in shifts})


def find_bias(use: LinearUse, program: Program) -> str | None:
    """Returns the parameter that is added to a product: by the operator, or by its only reader."""
    read = _bias_node(use)
    name = str(read.target) if read is not None and read.op == "get_attr" else None
    if use.part is not None and use.bias is not None:
        name = use.bias  # The operator reads those of several linears as one.
    if name is None or name not in program.weights:
        return None
    rows = use.product.meta["val"].shape[-1]
    return name if tuple(program.weights.source(name).shape) == (rows,) else None


def _bias_node(use: LinearUse) -> fx.Node | None:
    position = _BIAS_ARGUMENT.get(use.node.target)
    product = use.product
    if position is not None and len(use.node.args) > position:
        given = use.node.args[position]
        if isinstance(given, fx.Node):
            return given
    users = list(product.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
        return None
    others = [a for a in users[0].args if a is not product]
    found = others[0] if len(others) == 1 else None
    return found if isinstance(found, fx.Node) and found.op == "get_attr" else None


def refusal_to_shift(linear: Linear, program: Program) -> str | None:
    """Returns why the biases of a linear cannot be changed for it alone, or None; it has them all."""
    if any(use.part is not None and use.bias is not None for use in linear.uses):
        return "its bias was packed with those of other linears"
    own = {use.node for use in linear.uses}
    own |= {
        user for use in linear.uses for user in use.product.users if len(use.product.users) == 1
    }
    names = {find_bias(use, program) for use in linear.uses}
    for read in program.graph.find_nodes(op="get_attr"):
        if read.target in names:
            outside = [user for user in read.users if user not in own]
            if outside:
                return f"its bias {read.target} is read by {outside[0].name} too"
    return None


def refusal_to_add(linear: Linear, program: Program) -> str | None:
    """Returns why a linear cannot be given a bias, or None."""
    for use in linear.uses:
        if use.node.target not in _EXTENDABLE:
            return f"{use.node.target} takes no bias"
        if _bias_node(use) is not None:
            return "what it adds is not a parameter of its own"
        kind = _module_of(use)[1]
        if kind is not None and not _uses_its_bias(kind):
            return f"its module, a {kind.rpartition('.')[2]}, has no place for one"
        name = new_bias_name(use, linear)
        if name in program.weights:
            return f"the name {name} is taken"
    return None


def new_bias_name(use: LinearUse, linear: Linear) -> str:
    """Returns the name of the bias that a linear has where it is used, if it is given one."""
    path = _module_of(use)[0]
    if path is None:
        path = linear.parameter.removesuffix("weight").removesuffix(".")
    return f"{path}.bias"


def add_biases(program: Program, biases: Mapping[str, torch.Tensor]) -> Program:
    """Gives linears a bias at every use.

    Args:
        program: It is not changed.
        biases: By linear, [out] in the dtype of its weight; none that `refusal_to_add` refuses.
    """
    edited = program.fork()
    nodes = {node.name: node for node in edited.graph.nodes}
    sources: dict[str, Source] = {}
    for linear in find_linears(program):
        for use in linear.uses if linear.name in biases else ():
            name = new_bias_name(use, linear)
            bias = nn.Parameter(biases[linear.name], requires_grad=False)
            source = sources.setdefault(name, InMemory(bias))
            node = nodes[use.node.name]
            editor = Editor(edited, Match(edited, node, {}, frozenset({node})))
            read = editor.weight(name, source)
            if node.target is aten.linear.default:
                put = editor.call(node.target, *node.args[:2], read)
            else:
                put = editor.call(aten.add.Tensor, editor.call(node.target, *node.args), read)
            node.replace_all_uses_with(put)
            edited.graph.erase_node(node)
    edited.graph_module.recompile()
    return dataclasses.replace(edited, weights=edited.weights.replace(sources))


def _module_of(use: LinearUse) -> tuple[str | None, str | None]:
    """The path and the class, as text, of the module that a product was traced in."""
    stack = list((use.node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None, None
    path, kind = stack[-1]
    return path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _uses_its_bias(kind: str) -> bool:
    """Whether modules of a class compute x W^T + b once they have a bias: one is made, and tried."""
    module, _, name = kind.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 5), (3, 5), (3,)))
    try:
        trial: Any = cls.__new__(cls)
        nn.Module.__init__(trial)
        trial.weight, trial.bias = nn.Parameter(weight), nn.Parameter(bias)
        with torch.no_grad():
            found = trial(x)
    except Exception:  # A module that needs more than a weight and a bias may raise anything.
        return False
    expected = torch.nn.functional.linear(x, weight, bias)
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-5)
