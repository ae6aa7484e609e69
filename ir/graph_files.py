"""The graph of a stage after passes, written as what differs from the graph before them.

A node that was there before is named; one that was fed anew is named with what feeds it; a new one
is an ATen or `zeroskip::` operator on nodes and plain numbers, or reads a weight. Shapes and dtypes
are never written: they are computed again. Anything else has no form in files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.fact_files import NotStorableError
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program, bind_parameter, copy_graph_module
from zeroskip.ir.weights import Source

_NAMESPACES = ("aten", "zeroskip")
_STACK = "nn_module_stack"


def encode_graph(before: Program, after: Program) -> list[Any] | None:
    """Returns the graph of `after` as plain values; None where it is that of `before`.

    Raises:
        NotStorableError: A new node is none that can be written.
    """
    if after.level == "annotated":
        raise NotStorableError("a program with observers")
    known = {node.name: node for node in before.graph.nodes}
    found = [_encode_node(node, known, after) for node in after.graph.nodes]
    if found == [{"same": name} for name in known]:
        return None
    return found


def _encode_node(node: fx.Node, known: Mapping[str, fx.Node], program: Program) -> Any:
    old = known.get(node.name)
    if old is not None and _is_alike(old, node):
        if _names(old) == _names(node):
            return {"same": node.name}
        return {"fed": node.name, "nodes": _names(node)}
    if set(node.meta) - {"val", _STACK}:
        raise NotStorableError(f"{node.name} carries {sorted(set(node.meta) - {'val', _STACK})}")
    if node.op == "get_attr" and node.target in program.weights:
        return {"read": node.name, "weight": str(node.target)}
    target = getattr(node.target, "_schema", None)
    if node.op != "call_function" or target is None or node.kwargs:
        raise NotStorableError(f"{node.name} is new and calls {node.target}")
    namespace = target.name.split("::")[0]
    if namespace not in _NAMESPACES:
        raise NotStorableError(f"{node.name} calls {target.name}")
    return {
        "call": node.name,
        "operator": [*target.name.split("::"), target.overload_name or "default"],
        "arguments": [_encode_argument(value) for value in node.args],
        "module": _module_of(node, known),
    }


def _is_alike(old: fx.Node, new: fx.Node) -> bool:
    """Whether two nodes do the same, whatever feeds them."""
    if (old.op, old.target) != (new.op, new.target):
        return False
    if old.meta.keys() != new.meta.keys() or old.meta.get("packing") != new.meta.get("packing"):
        return False
    return bool(_without_nodes(old) == _without_nodes(new))


def _without_nodes(node: fx.Node) -> Any:
    return fx.node.map_arg((node.args, node.kwargs), lambda n: "a node")


def _names(node: fx.Node) -> list[str]:
    names: list[str] = []

    def note(argument: fx.Node) -> fx.Node:
        names.append(argument.name)
        return argument

    fx.node.map_arg((node.args, node.kwargs), note)
    return names


def _encode_argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode_argument(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise NotStorableError(f"an argument {value!r}")


def _module_of(node: fx.Node, known: Mapping[str, fx.Node]) -> str | None:
    """A node from before that was traced in the same module."""
    stack = node.meta.get(_STACK)
    if stack is None:
        return None
    for name, old in known.items():
        if old.meta.get(_STACK) == stack:
            return name
    raise NotStorableError(f"{node.name} was traced in a module that nothing else is in")


def decode_graph(
    before: Program, stored: list[Any] | None, weights: Mapping[str, Source]
) -> Program:
    """Returns the program before with the stored graph, and with some weights replaced or added.

    Raises:
        ArtifactError: The values are none that `encode_graph` returns for this program.
    """
    module = copy_graph_module(before.graph_module)
    for name, source in weights.items():
        bind_parameter(module, name, source)
    everything = before.weights.replace(weights)
    changed = dataclasses.replace(before, graph_module=module, weights=everything)
    if stored is None:
        return changed
    known = {node.name: node for node in module.graph.nodes}
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for entry in stored:
            node = _decode_node(entry, graph, nodes, known, changed)
            nodes[node.name] = node
        return dataclasses.replace(changed, graph_module=fx.GraphModule(module, graph))
    # What an operator raises on arguments that are not its own is any error.
    except Exception as error:
        raise ArtifactError(f"a stored graph cannot be read: {error!r}") from error


def _decode_node(
    entry: Mapping[str, Any],
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    known: Mapping[str, fx.Node],
    program: Program,
) -> fx.Node:
    if "same" in entry or "fed" in entry:
        old = known[entry.get("same") or entry["fed"]]
        feeding = iter(entry.get("nodes") or _names(old))
        return graph.node_copy(old, lambda _: nodes[next(feeding)])
    if "read" in entry:
        source = program.weights.source(entry["weight"])
        node = graph.create_node("get_attr", entry["weight"], name=entry["read"])
        with _fake_mode(nodes.values()):
            node.meta = {"val": torch.empty(source.shape, dtype=source.dtype, device="cpu")}
        return node
    namespace, name, overload = entry["operator"]
    if namespace not in _NAMESPACES:
        raise ValueError(f"{namespace}::{name} is no operator of a stage")
    target = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    arguments = tuple(_decode_argument(value, nodes) for value in entry["arguments"])
    node = graph.create_node("call_function", target, arguments, name=entry["call"])
    values = fx.node.map_arg(arguments, lambda n: n.meta["val"])
    with _fake_mode(nodes.values()), torch.no_grad():
        node.meta = {"val": target(*values)}
    if entry["module"] is not None:
        node.meta[_STACK] = known[entry["module"]].meta[_STACK]
    return node


def _fake_mode(nodes: Any) -> FakeTensorMode:
    values = [value for node in nodes if (value := node.meta.get("val")) is not None]
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


def _decode_argument(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, dict):
        return nodes[value["node"]]
    if isinstance(value, list):
        return [_decode_argument(item, nodes) for item in value]
    return value


def same_graph(first: Program, second: Program) -> bool:
    """Whether two programs compute the same, by text and by the names of their nodes."""
    names = [[node.name for node in program.graph.nodes] for program in (first, second)]
    texts = [print_program(dataclasses.replace(p, facts={})) for p in (first, second)]
    return names[0] == names[1] and texts[0] == texts[1]
