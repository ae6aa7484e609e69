"""Running a graph on labels instead of numbers: the interpreter that analyses of channels share."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from zeroskip.ir.program import Program, attribute
from zeroskip.ir.scale_equations import squeeze_repeats
from zeroskip.ir.scale_values import Call, Refused, Value, fixed

# Whose operators are what their name says.
_NAMESPACES = ("aten", "transformers")
# What a rule may raise for arguments that it was not written for.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class LabelFlow(ABC):
    """Runs a program on labels, by rules.

    Class variables:
        rules: What each operator does with labels, by target or by the operator's own name.
        writers: Operators that write into an argument and whose rule follows that.

    Args:
        program: At level `captured`.
        growth: Multiplies every dynamic size of the example inputs.
    """

    rules: ClassVar[Mapping[Any, Callable[[Any, Call], Value]]]
    writers: ClassVar[tuple[Any, ...]] = ()

    program: Program
    growth: int = 1
    env: dict[fx.Node, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sizes = _symbol_sizes(self.program, self.growth)
        self._constants: dict[fx.Node, Any] = {}
        self._written = _written(self.program)

    @abstractmethod
    def labels(self, value: Value) -> torch.Tensor:
        """Returns the labels of a tensor argument."""

    @abstractmethod
    def read_parameter(self, node: fx.Node) -> Value:
        """Returns what stands for a parameter of the program."""

    def read_input(self, node: fx.Node) -> Value:
        """Returns what stands for an input of the program."""
        return self.fixed_value(node)

    def rule_of(self, node: fx.Node) -> Callable[[Any, Call], Value] | None:
        """Returns the rule that an operator follows, or None."""
        rule = self.rules.get(node.target)
        if rule is None and getattr(node.target, "namespace", "") in _NAMESPACES:
            rule = self.rules.get(getattr(node.target, "_opname", ""))
        return rule

    @abstractmethod
    def refuse(self, value: Value, why: str) -> None:
        """Notes that whatever labels a value has lead no further."""

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Returns the shape of a node's value as numbers."""
        return self._shape(node.meta["val"])

    def is_float(self, node: fx.Node) -> bool:
        """Whether a node's value is a floating-point tensor."""
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def constant(self, node: object) -> Any:
        """Returns the value of an argument that depends on no input and no parameter, else None."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._constants:
            self._constants[node] = self._evaluate(node)
        return self._constants[node]

    def run(self) -> None:
        """Runs the graph once."""
        self.env = {}
        for node in self.program.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self.refuse(self.env[source], "it leaves the program")
            elif node.op == "get_attr":
                if node.target in self.program.weights:
                    self.env[node] = self.read_parameter(node)
                else:
                    self.env[node] = self.fixed_value(node)
            elif node.op == "placeholder":
                self.env[node] = self.read_input(node)
            else:
                self.env[node] = self._apply(node)

    def _apply(self, node: fx.Node) -> Value:
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        args, kwargs = arguments
        call = Call(node, args, kwargs)
        name = getattr(node.target, "_opname", "")
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            if not name.startswith("sym_"):  # sizes do not depend on values
                self.refuse([args, kwargs], f"{call.why}: reads values as numbers")
            return self.fixed_value(node)
        if node.target is operator.getitem:
            return args[0][args[1]]
        try:
            return self._checked(node, self.rule_of(node), call)
        except Refused as refused:
            reason = str(refused)
        except _UNFORESEEN:
            reason = "is used in a way that its rule does not know"
        self.refuse([args, kwargs], f"{call.why}: {reason}")
        return self.fixed_value(node)

    def _checked(
        self, node: fx.Node, rule: Callable[[Any, Call], Value] | None, call: Call
    ) -> Value:
        if rule is None:
            raise Refused("not known to keep them")
        if node.target._schema.is_mutable and node.target not in self.writers:  # type: ignore[union-attr]
            raise Refused("writes into its arguments")
        result = rule(self, call)
        self._check(node.meta["val"], result)
        return result

    def _check(self, value: Any, result: Value) -> None:
        """Raises unless labels have the shape of a value, and none stand for what is not real."""
        if isinstance(value, (list, tuple)):
            for item, labels in zip(value, result, strict=True):
                self._check(item, labels)
        elif isinstance(value, torch.Tensor):
            if tuple(result.shape) != self._shape(value):
                raise Refused("is used in a way that its rule does not know")
            real = value.is_floating_point() or not isinstance(result, torch.Tensor)
            if not real and bool(squeeze_repeats(result).any()):
                raise Refused("rounds")

    def fixed_value(self, node: fx.Node) -> Value:
        """A value that no scale reaches: zeros for tensors, numbers as they are."""
        return self._fixed(node.meta.get("val"))

    def _fixed(self, value: Any) -> Value:
        if isinstance(value, torch.Tensor):
            return fixed(self._shape(value))
        if isinstance(value, (list, tuple)):
            return [self._fixed(item) for item in value]
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return value.node.hint
        return value

    def _shape(self, value: torch.Tensor) -> tuple[int, ...]:
        return tuple(self._size(size) for size in value.shape)

    def _size(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        found = size.node.expr.subs(self._sizes)
        # A size that depends on data: any will do.
        found = found.xreplace(dict.fromkeys(found.free_symbols, 4))
        return int(found)

    def _evaluate(self, node: fx.Node) -> Any:
        if node in self._written:
            return None
        if node.op == "get_attr" and node.target not in self.program.weights:
            return attribute(self.program.graph_module, str(node.target))
        if node.op != "call_function":
            return None
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            return self.env.get(node)
        values = {source: self.constant(source) for source in node.all_input_nodes}
        schema = getattr(node.target, "_schema", None)
        if any(v is None for v in values.values()) or schema is None or schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _written(program: Program) -> set[fx.Node]:
    """The nodes whose memory, or a part of it, an operator writes into after they were computed."""
    written: set[fx.Node] = set()
    pending = [node for writer in program.graph.nodes for node in _targets(writer)]
    while pending:
        node = pending.pop()
        if node not in written:
            written.add(node)
            pending += [source for source in node.all_input_nodes if _is_view(node)]
            pending += [user for user in node.users if _is_view(user)]
    return written


def _targets(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = {
        **node.kwargs,
        **dict(zip((a.name for a in schema.arguments), node.args, strict=False)),
    }
    names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [given[name] for name in names if isinstance(given.get(name), fx.Node)]


def _is_view(node: fx.Node) -> bool:
    """Whether what an operator returns may be memory of its arguments."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return any(result.alias_info is not None for result in schema.returns)


def _symbol_sizes(program: Program, growth: int) -> dict[Any, Any]:
    """The size of every dynamic dimension of the inputs, by symbol."""
    sizes: dict[Any, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name, value = str(node.target), node.meta.get("val")
        given = program.example_inputs.get(name)
        if not isinstance(value, torch.Tensor) or given is None:
            continue
        for size, actual in zip(value.shape, given.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                sizes[size.node.expr] = max(int(actual), 2) * growth
    return sizes
