"""Rewrite rules: local algebra as three plain functions, and the driver that applies them.

A rule says what to look for, when to refuse, and what to put there::

    def found(x, w):            return aten.relu.default(aten.linear.default(x, w))
    def check(match):           return "w is shared" if ... else None
    def put(editor, x, w):      return editor.call(aten.my_op.default, x, w)

Matched values, nodes or literals, are bound by parameter name. A refused match is data: a `Refusal`
with a reason and a node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroskip.ir.program import Program, bind_parameter, holder
from zeroskip.ir.weights import Source


@dataclass(frozen=True)
class Refusal:
    """Why a rule did not fire where its pattern matched."""

    rule: str
    reason: str
    node: str


@dataclass(frozen=True)
class Match:
    """Where a pattern was found.

    Args:
        program: The program being rewritten.
        root: The node whose value is replaced.
        values: What the pattern's parameters stand for: nodes or literals.
        nodes: Every matched operator, the root among them.
    """

    program: Program
    root: fx.Node
    values: Mapping[str, Any]
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class RewriteRule:
    """A rewrite of matched operators by others that compute the same.

    Args:
        name: The algebra, in words.
        pattern: A function of the bound values that calls ATen overloads.
        rewrite: A function of an `Editor` and the values; returns the node that takes over.
        check: A function of the `Match`; returns a reason to refuse, or None.
    """

    name: str
    pattern: Callable[..., Any]
    rewrite: Callable[..., fx.Node]
    check: Callable[[Match], str | None] = field(default=lambda match: None)


class Editor:
    """Adds nodes in front of a matched root; each gets its shape and dtype at once."""

    def __init__(self, program: Program, match: Match) -> None:
        self._program = program
        self.match = match

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Adds an operator call and computes its `meta["val"]` on fake tensors."""
        graph = self._program.graph
        with graph.inserting_before(self.match.root):
            node = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        mode = detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            node.meta = {"val": target(*values)}
        stack = self.match.root.meta.get("nn_module_stack")
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """Adds a buffer of the program and reads it."""
        module, leaf = holder(self._program.graph_module, name)
        module.register_buffer(leaf, value)
        return self._read(name, value)

    def weight(self, name: str, source: Source) -> fx.Node:
        """Reads a weight of the program; one that is new has to be added to its `Weights` as well."""
        bind_parameter(self._program.graph_module, name, source)
        return self._read(name, torch.empty(source.shape, dtype=source.dtype, device="meta"))

    def _read(self, name: str, value: torch.Tensor) -> fx.Node:
        graph = self._program.graph
        with graph.inserting_before(self.match.root):
            node = graph.get_attr(name)
        vals = [v for n in self.match.nodes for v in (n.meta.get("val"),)]
        mode = detect_fake_mode(vals) or FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            node.meta = {"val": torch.empty(value.shape, dtype=value.dtype, device="cpu")}
        return node


def apply_rules(
    program: Program, rules: Sequence[RewriteRule]
) -> tuple[Program, int, list[Refusal]]:
    """Applies rules everywhere they match, each node to the first rule that takes it.

    Args:
        program: It is not changed.
        rules: Tried in order at every node.

    Returns:
        The rewritten program, the number of rewrites, and every refusal.
    """
    edited = program.fork()
    patterns = [(rule, *_trace(rule.pattern)) for rule in rules]
    count = 0
    refusals: list[Refusal] = []
    for node in list(edited.graph.nodes):
        for rule, names, root in patterns:
            match = _match(edited, node, names, root)
            if match is None:
                continue
            reason = _escapes(match) or rule.check(match)
            if reason is not None:
                refusals.append(Refusal(rule.name, reason, node.name))
                continue
            replacement = rule.rewrite(Editor(edited, match), **match.values)
            node.replace_all_uses_with(replacement)
            for old in sorted(match.nodes, reverse=True):
                if not old.users:
                    edited.graph.erase_node(old)
            count += 1
            break
    edited.graph_module.recompile()
    return edited, count, refusals


def _trace(pattern: Callable[..., Any]) -> tuple[list[str], fx.Node]:
    graph = fx.Graph()
    names = list(inspect.signature(pattern).parameters)
    tracer = fx.Tracer()
    graph = tracer.trace(pattern)
    root = graph.output_node().args[0]
    assert isinstance(root, fx.Node)
    return names, root


def _match(program: Program, node: fx.Node, names: list[str], root: fx.Node) -> Match | None:
    values: dict[str, Any] = {}
    nodes: set[fx.Node] = set()

    def matches(pattern: Any, found: Any) -> bool:
        if isinstance(pattern, fx.Node) and pattern.op == "placeholder":
            name = str(pattern.target)
            if name in values:
                return values[name] is found
            values[name] = found
            return True
        if isinstance(pattern, fx.Node):
            if not isinstance(found, fx.Node) or found.target is not pattern.target:
                return False
            if len(found.args) != len(pattern.args) or found.kwargs != pattern.kwargs:
                return False
            nodes.add(found)
            return all(matches(p, f) for p, f in zip(pattern.args, found.args, strict=True))
        if isinstance(pattern, (list, tuple)) and isinstance(found, (list, tuple)):
            return len(pattern) == len(found) and all(map(matches, pattern, found))
        return bool(pattern == found)

    if node.op != "call_function" or not matches(root, node):
        return None
    return Match(program, node, {n: values[n] for n in names}, frozenset(nodes))


def _escapes(match: Match) -> str | None:
    """An inner value that something else reads must stay: the rewrite would compute it twice."""
    for node in match.nodes:
        outside = [u for u in node.users if u not in match.nodes]
        if node is not match.root and outside:
            return f"{node.name} is also read by {outside[0].name}"
    return None
