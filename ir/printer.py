"""A Program as canonical text: the form for goldens, diffs and bug reports.

Values are numbered in order of appearance, sizes that vary are named s0, s1, ..., and no weight,
address or library-made name appears. Two programs with the same text compute the same thing, given
the same weights.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from zeroskip.ir.program import Program

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def print_program(program: Program) -> str:
    """Returns the canonical text of a program.

    Before a value is used it is defined on a line of its own::

        program(input_ids: i64[s0, s1]) captured
          %0 = embedding(@embed.weight, input_ids) : f32[s0, s1, 8]
          return logits=%0
    """
    return _Printer(program).text()


class _Printer:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._names: dict[fx.Node, str] = {}
        self._symbols: dict[str, str] = {}
        self._sizes: dict[Any, str] = {}

    def text(self) -> str:
        program = self._program
        arguments = []
        for node in program.graph.find_nodes(op="placeholder"):
            self._names[node] = str(node.target)
            arguments.append(f"{node.target}: {self._type(node)}")
        lines = [f"program({', '.join(arguments)}) {program.level}"]
        count = 0
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self._names[node] = f"@{node.target}"
            elif node.op in ("call_function", "call_module"):
                called = ", ".join(
                    [self._value(a) for a in node.args]
                    + [f"{k}={self._value(v)}" for k, v in node.kwargs.items()]
                )
                target = f"@{node.target}" if node.op == "call_module" else _operator(node)
                self._names[node] = f"%{count}"
                count += 1
                lines.append(f"  {self._names[node]} = {target}({called}) : {self._type(node)}")
        values = program.graph.output_node().args[0]
        assert isinstance(values, (tuple, list))
        results = zip(program.outputs, values, strict=False)
        lines.append(f"  return {', '.join(f'{n}={self._value(v)}' for n, v in results)}")
        for kind in sorted(program.facts, key=lambda k: k.__name__):
            lines.append(f"  fact {kind.__name__}")
        return "\n".join(lines) + "\n"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names.get(value, "%undefined")
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(v) for v in value)}]"
        if value == torch.iinfo(torch.int64).max and not isinstance(value, bool):
            return "end"
        return repr(value) if isinstance(value, str) else str(value)

    def _type(self, node: fx.Node) -> str:
        return self._describe(node.meta.get("val"))

    def _describe(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._size(size) for size in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self._describe(v) for v in value)})"
        if isinstance(value, torch.SymInt):
            return f"size {self._size(value)}"
        return type(value).__name__

    def _size(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        if expression not in self._sizes:  # Few sizes occur, each of them often.
            for symbol in sorted(expression.free_symbols, key=str):
                self._symbols.setdefault(str(symbol), f"s{len(self._symbols)}")
            renamed = re.sub(r"\w+", self._renamed, str(expression))
            self._sizes[expression] = renamed
        return self._sizes[expression]

    def _renamed(self, word: re.Match[str]) -> str:
        return self._symbols.get(word[0], word[0])


def _operator(node: fx.Node) -> str:
    """`aten.add.Tensor` prints as `add`, an operator of another library with its namespace."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    namespace, name = schema.name.split("::")
    return str(name if namespace == "aten" else f"{namespace}.{name}")
