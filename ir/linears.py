"""Every linear of a Program as one view, whatever operator spells it.

A linear is a matrix product of an activation with a parameter. PyTorch models spell it `linear`,
`addmm` (Conv1D), `matmul` or `mm` with a transposed parameter, `bmm` or a grouped product with a
3-D parameter (one linear for each expert). All become `Linear`, with W as [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zeroskip.ir.packing import LINEAR_24, SPARSE_LINEAR, Fusion, Packing
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Match, RewriteRule
from zeroskip.ir.weights import Masked, Source, pack_bits, unpack_bits

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearUse:
    """One node that multiplies by the weight.

    Args:
        node: The operator.
        activation: What is multiplied: [..., in], or [experts, tokens, in] for `bmm`.
        weight: The argument that holds the weight expression.
        bias: The parameter that is added, when the operator adds one.
        offsets: For grouped products, the node with the end row of each expert.
        part: Where the operator computes several linears, the slice with the rows of this one.
    """

    node: fx.Node
    activation: fx.Node
    weight: fx.Node
    bias: str | None = None
    offsets: fx.Node | None = None
    part: fx.Node | None = None

    @property
    def product(self) -> fx.Node:
        """The node whose value is the product of this linear alone."""
        return self.part or self.node


@dataclass(frozen=True)
class Linear:
    """One linear map y = x W^T + b of a Program.

    Args:
        name: The parameter's fully qualified name; with `[e]` behind it for expert e.
        parameter: The parameter's fully qualified name.
        out_features: Rows of W.
        in_features: Columns of W.
        transposed: The parameter is stored [in, out].
        expert: Index into a 3-D parameter, or None.
        uses: Where the program multiplies by it; several when the weight is shared.
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool
    expert: int | None
    uses: tuple[LinearUse, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.out_features, self.in_features)

    def weight(self, program: Program) -> torch.Tensor:
        """Loads W as [out, in]; a view where possible, never to be written to."""
        return self.view(program.weights[self.parameter])

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Views a tensor of the parameter's shape as [out, in]."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix


def find_linears(program: Program) -> list[Linear]:
    """Returns every linear of a program in the order of first use."""
    uses: dict[str, list[tuple[LinearUse, bool]]] = {}
    for node in program.graph.nodes:
        spelled = _spelling(node, program)
        for use, parameter, transposed in _packed_spellings(node) if spelled is None else [spelled]:
            uses.setdefault(parameter, []).append((use, transposed))
    linears: list[Linear] = []
    for parameter, found in uses.items():
        if len({transposed for _, transposed in found}) > 1:
            continue  # Used both ways round: "input dimension" has no one meaning.
        linears += _views(parameter, program, found[0][1], tuple(use for use, _ in found))
    return linears


def _views(
    parameter: str, program: Program, transposed: bool, uses: tuple[LinearUse, ...]
) -> list[Linear]:
    shape = program.weights.source(parameter).shape
    rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    if len(shape) == 2:
        return [Linear(parameter, parameter, rows, columns, transposed, None, uses)]
    return [
        Linear(f"{parameter}[{e}]", parameter, rows, columns, transposed, e, uses)
        for e in range(shape[0])
    ]


# Each spelling: position of the activation, of the weight, of the bias, and whether the operator
# multiplies by the weight as it stands ([in, out]) rather than by its transpose.
_SPELLINGS: dict[Any, tuple[int, int, int | None, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.addmm.default: (1, 2, 0, True),
    aten.mm.default: (0, 1, None, True),
    aten.matmul.default: (0, 1, None, True),
    aten.bmm.default: (0, 1, None, True),
    torch.ops.zeroskip.masked_linear.default: (0, 1, 3, False),
}
# The same of operators with packed operands; the weight is the operand with the values.
_PACKED_SPELLINGS: dict[Any, tuple[int, int, int]] = {
    SPARSE_LINEAR: (0, 3, 5),
    LINEAR_24: (0, 1, 3),
}
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


def _spelling(node: fx.Node, program: Program) -> tuple[LinearUse, str, bool] | None:
    """Returns (use, parameter, transposed) when a node multiplies by a parameter."""
    if node.op != "call_function":
        return None
    grouped = getattr(node.target, "_opname", "") in _GROUPED
    spelling = (0, 1, None, True) if grouped else _SPELLINGS.get(node.target)
    if spelling is None or len(node.args) <= spelling[1]:
        return None
    activation_at, weight_at, bias_at, stored_in_out = spelling
    activation, weight = node.args[activation_at], node.args[weight_at]
    if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
        return None
    source = _transposed_parameter(weight, program)
    if source is None or _transposed_parameter(activation, program) is not None:
        return None
    parameter, swapped = source
    rank = len(program.weights.source(parameter).shape)
    if rank != (3 if grouped or node.target is aten.bmm.default else 2):
        return None
    if node.target is aten.addmm.default and (node.kwargs or len(node.args) > 3):
        return None  # alpha or beta: not a plain linear.
    offsets = None
    if grouped:
        found = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
        if not isinstance(found, fx.Node):
            return None
        offsets = found
    bias = None
    if bias_at is not None and len(node.args) > bias_at:
        argument = node.args[bias_at]
        bias = str(argument.target) if isinstance(argument, fx.Node) else None
    use = LinearUse(node, activation, weight, bias, offsets)
    return use, parameter, stored_in_out != swapped


def _packed_spellings(node: fx.Node) -> list[tuple[LinearUse, str, bool]]:
    """Returns (use, parameter, transposed) for each linear that a node computes with packed operands."""
    packing = node.meta.get("packing")
    if node.target not in _PACKED_SPELLINGS or packing is None:
        return []
    found = [node.args[at] for at in _PACKED_SPELLINGS[node.target]]
    activation, values, bias = (each if isinstance(each, fx.Node) else None for each in found)
    assert activation is not None
    assert values is not None
    if isinstance(packing, Packing):
        use = LinearUse(node, activation, values, str(bias.target) if bias else None)
        return [(use, packing.parameter, packing.transposed)]
    assert isinstance(packing, Fusion)
    slices = {user.args[2]: user for user in node.users if user.target is aten.slice.Tensor}
    return [
        (
            LinearUse(node, activation, values, each.bias, part=slices.get(each.first_row)),
            each.packing.parameter,
            each.packing.transposed,
        )
        for each in packing.linears
    ]


def _transposed_parameter(node: fx.Node, program: Program) -> tuple[str, bool] | None:
    """Follows transposes and copies back to a parameter: (name, transposed an odd number of times).

    None when the expression is anything else, such as `1 + w` or a slice.
    """
    swapped = False
    while node.op == "call_function":
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        step = swaps_last_two(node)
        if step is None:
            return None
        swapped ^= step
        node = node.args[0]
    if node.op == "get_attr" and node.target in program.weights:
        rank = len(program.weights.source(str(node.target)).shape)
        return (str(node.target), swapped) if rank in (2, 3) else None
    return None


def swaps_last_two(node: fx.Node) -> bool | None:
    """Whether an operator swaps the last two dimensions (True) or keeps all (False), else None."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    rank = value.dim()
    if node.target in (aten.t.default, aten.numpy_T.default):
        return True if rank == 2 else None
    if node.target in (aten.mT.default, aten.adjoint.default):
        return True
    if node.target is aten.transpose.int:
        swapped = {int(d) % rank for d in node.args[1:3]}  # type: ignore[arg-type]
        return True if swapped == {rank - 1, rank - 2} else None
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        plain = list(range(rank))
        if order == plain:
            return False
        return True if order == [*plain[:-2], rank - 1, rank - 2] else None
    unchanged = (
        aten.detach.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
    )
    return False if node.target in unchanged else None


def masked_sources(program: Program, keeps: Mapping[str, torch.Tensor]) -> dict[str, Source]:
    """Returns the masked form of each parameter that holds one of the linears named.

    Args:
        program: The program that the linears belong to.
        keeps: Boolean [out, in] by linear; True keeps the weight.
    """
    by_parameter: dict[str, list[Linear]] = {}
    for linear in find_linears(program):
        if linear.name in keeps:
            by_parameter.setdefault(linear.parameter, []).append(linear)
    sources: dict[str, Source] = {}
    for parameter, linears in by_parameter.items():
        source = program.weights.source(parameter)
        keep = torch.ones(source.shape, dtype=torch.bool)
        if isinstance(source, Masked):
            keep = unpack_bits(source.bits, source.shape)
            source = source.source
        for linear in linears:
            linear.view(keep).logical_and_(keeps[linear.name])
        sources[parameter] = Masked(source, pack_bits(keep))
    return sources


def linear_rules(
    operator: str, put: Callable[..., fx.Node], check: Callable[[Match], str | None]
) -> list[RewriteRule]:
    """Returns the rules that rewrite a linear to an operator, one for each way to spell it.

    Args:
        operator: For the names of the rules.
        put: A function of an `Editor`, the activation, the weight expression and the bias or None.
        check: Returns why a match is refused, or None.
    """
    spellings: list[tuple[str, Callable[..., object]]] = [
        ("linear(x, w)", lambda x, w: aten.linear.default(x, w)),
        ("linear(x, w, b)", lambda x, w, b: aten.linear.default(x, w, b)),
        ("addmm(b, x, w)", lambda x, w, b: aten.addmm.default(b, x, w)),
        ("matmul(x, w)", lambda x, w: aten.matmul.default(x, w)),
        ("mm(x, w)", lambda x, w: aten.mm.default(x, w)),
    ]
    return [RewriteRule(f"{name} = {operator}", found, put, check) for name, found in spellings]
