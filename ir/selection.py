"""Which linears a pass works on: the parts they play, found from the graph, and the user's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import fx

from zeroskip.ir.dataflow import is_elementwise, is_movement
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Roles
from zeroskip.ir.linears import Linear, find_linears, swaps_last_two
from zeroskip.ir.program import Program

aten = torch.ops.aten


def find_roles(program: Program) -> Roles:
    """Finds output heads, expert routers and shared weights from the graph alone.

    A head is a linear whose output reaches a program output through element-wise operators and
    data movement only, and is as wide as the largest embedding table (the vocabulary), or tied to one. A
    router is a linear whose output is ranked by top-k before anything multiplies by a parameter.
    """
    tables = {
        name: int(program.weights.source(name).shape[0])
        for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if (name := str(getattr(node.args[0], "target", ""))) in program.weights
    }
    # The vocabulary is the largest table: a table of two token types is as wide as two labels.
    vocabulary = max(tables.values(), default=None)
    heads, routers, shared = set(), set(), set()
    for linear in find_linears(program):
        outputs = [use.node for use in linear.uses]
        as_wide = linear.out_features == vocabulary or linear.parameter in tables
        if as_wide and _reaches(outputs, _is_output, _carries):
            heads.add(linear.name)
        if _reaches(outputs, _is_ranking, _carries):
            routers.add(linear.name)
        if _has_other_users(linear, program):
            shared.add(linear.name)
    return Roles(frozenset(heads), frozenset(routers), frozenset(shared - heads))


def _is_output(node: fx.Node) -> bool:
    return node.op == "output"


def _is_ranking(node: fx.Node) -> bool:
    return node.target in (aten.topk.default, aten.argmax.default, aten.sort.default)


def _carries(node: fx.Node) -> bool:
    """Whether a node hands on its input's channels: element-wise, movement or a softmax."""
    normalising = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
    return is_elementwise(node) or is_movement(node) or node.target in normalising


def _reaches(
    start: Iterable[fx.Node], goal: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]
) -> bool:
    seen: set[fx.Node] = set()
    queue = list(start)
    while queue:
        node = queue.pop()
        for user in node.users:
            if goal(user):
                return True
            if user not in seen and through(user):
                seen.add(user)
                queue.append(user)
    return False


def _has_other_users(linear: Linear, program: Program) -> bool:
    """Whether anything but this linear's own nodes reads the parameter."""
    weights = {use.weight for use in linear.uses}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target != linear.parameter:
            continue
        queue = [node]
        while queue:
            current = queue.pop()
            for user in current.users:
                if current in weights and any(user is use.node for use in linear.uses):
                    continue
                if swaps_last_two(user) is None:
                    return True
                queue.append(user)
    return False


def select_linears(
    program: Program, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> list[Linear]:
    """Returns the linears that a pass works on.

    Args:
        program: A program that knows its `Roles`.
        include: Shell-style patterns of names. When given, only these are taken, heads, routers
            and shared weights among them.
        exclude: Patterns of names that are left out in any case.
    """
    roles = program.fact(Roles)

    def wanted(linear: Linear) -> bool:
        if any(_matches(linear.name, p) for p in exclude):
            return False
        if include:
            return any(_matches(linear.name, p) for p in include)
        return roles.role(linear.name) is None

    return [linear for linear in find_linears(program) if wanted(linear)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is the name, or fits it; the brackets of an expert are also a character set."""
    bare = name.removesuffix(".weight")
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(bare, pattern)


def check_selection(program: Program, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    """Raises CompileError when a name pattern matches nothing, or everything is left out."""
    linears = find_linears(program)
    names = [linear.name for linear in linears]
    for pattern in (*include, *exclude):
        if not any(_matches(name, pattern) for name in names):
            raise CompileError(
                f"the pattern {pattern!r} matches no linear",
                next_step=f"the linears are {', '.join(names[:6])}"
                + (", ..." if len(names) > 6 else ""),
            )
    if linears and not select_linears(program, include, exclude):
        raise CompileError(
            "no linear is left to work on",
            next_step="widen `include` or narrow `exclude`",
        )
