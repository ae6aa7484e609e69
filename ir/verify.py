"""The rules that every Program obeys, one function each.

A rule takes a Program and returns where it is broken, as (node or name, reason), or None. All of
them hold before and after every pass; `verify` runs them all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from zeroskip.ir.dataflow import is_view
from zeroskip.ir.errors import VerifyError
from zeroskip.ir.observers import Observer
from zeroskip.ir.program import Program, attribute

Violation = tuple[str, str]
Rule = Callable[[Program], Violation | None]


def check_structure(program: Program) -> Violation | None:
    """Nodes are used after they are defined, names are unique, there is one output."""
    try:
        program.graph.lint()
    except Exception as error:  # fx raises RuntimeError, AttributeError or a bare assertion.
        return "graph", str(error).splitlines()[0] if str(error) else type(error).__name__
    outputs = program.graph.find_nodes(op="output")
    if len(outputs) != 1:
        return "graph", f"there are {len(outputs)} output nodes"
    return None


def check_signature(program: Program) -> Violation | None:
    """Placeholders are the example inputs, and each output has a name."""
    if set(program.inputs) != set(program.example_inputs):
        return (
            "signature",
            f"placeholders {sorted(program.inputs)}, examples {sorted(program.example_inputs)}",
        )
    values = program.graph.output_node().args[0]
    if not isinstance(values, (tuple, list)) or len(values) != len(program.outputs):
        return "output", f"the output is not a flat tuple of {len(program.outputs)} values"
    return None


def check_metadata(program: Program) -> Violation | None:
    """Every value carries its shape and dtype in `meta["val"]`."""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function", "call_module") and "val" not in node.meta:
            return node.name, 'has no meta["val"]; a rewrite must set the shape and dtype'
    return None


def check_attributes(program: Program) -> Violation | None:
    """Every `get_attr` finds a weight or a constant, of the shape and dtype it had."""
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        try:
            held = attribute(program.graph_module, name)
        except AttributeError:
            return node.name, f"reads {name}, which the program does not hold"
        source = program.weights.source(name) if name in program.weights else held
        is_parameter = isinstance(held, torch.nn.Parameter)
        if is_parameter and name not in program.weights:
            return node.name, f"reads parameter {name}, which is not among the weights"
        expected = node.meta.get("val")
        if isinstance(expected, torch.Tensor) and isinstance(held, torch.Tensor):
            for what in (source, held):
                if (what.shape, what.dtype) != (expected.shape, expected.dtype):
                    here = f"{tuple(what.shape)} {what.dtype}"
                    there = f"{tuple(expected.shape)} {expected.dtype}"
                    return node.name, f"{name} is {here}, the graph expects {there}"
    return None


def check_level(program: Program) -> Violation | None:
    """Operators belong to the level: `zeroskip::` only when lowered, observers only when annotated."""
    for node in program.graph.nodes:
        if node.op == "call_module":
            observer = isinstance(attribute(program.graph_module, str(node.target)), Observer)
            if not observer or program.level != "annotated":
                return node.name, f"calls module {node.target} at level {program.level}"
        elif node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is None:
                if not _is_arithmetic(node):
                    return node.name, f"calls {node.target}, which is not an operator"
            elif schema.name.startswith("zeroskip::") and program.level != "lowered":
                return node.name, f"calls {schema.name} at level {program.level}"
        elif node.op not in ("placeholder", "get_attr", "output"):
            return node.name, f"is a {node.op}"
    return None


def _is_arithmetic(node: fx.Node) -> bool:
    """Sizes are computed by Python's own operators, and tuples are indexed by getitem."""
    target: Any = node.target
    modules = (operator.__name__, "_operator", "math", "torch", "torch.fx.experimental.sym_node")
    return callable(target) and getattr(target, "__module__", "") in modules


def check_purity(program: Program) -> Violation | None:
    """No operator writes into an input or a weight, or into a view of one."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else None
            owner = _owner(node.kwargs.get(argument.name, given))
            if owner is not None:
                return node.name, f"{schema.name} writes into {owner.target}"
    return None


def _owner(value: Any) -> fx.Node | None:
    """Returns the input or weight whose memory a value may be."""
    while isinstance(value, fx.Node) and value.op == "call_function" and is_view(value):
        value = value.args[0] if value.args else None
    held = isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr")
    return value if held else None


def check_facts(program: Program) -> Violation | None:
    """Every fact that is claimed still holds."""
    for kind, fact in program.facts.items():
        reason = fact.check(program)
        if reason is not None:
            return kind.__name__, reason
    return None


RULES: dict[str, Rule] = {
    "structure": check_structure,
    "signature": check_signature,
    "metadata": check_metadata,
    "attributes": check_attributes,
    "level": check_level,
    "purity": check_purity,
    "facts": check_facts,
}


def verify(program: Program, after: str = "capture") -> None:
    """Checks a program against every rule.

    Args:
        program: What to check.
        after: The pass that made it, for the message.

    Raises:
        VerifyError: A rule is broken; names the rule, the node and the pass.
    """
    for name, rule in RULES.items():
        violation = rule(program)
        if violation is not None:
            where, reason = violation
            raise VerifyError(
                f"the program breaks the rule {name!r}: {reason}",
                where=where,
                pass_name=after,
                next_step="this is a defect of the pass; print the program before and after it",
            )
