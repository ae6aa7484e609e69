"""Finds the linears of an ONNX file that can run sparse or dense."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from zeroskip.runtime.onnx.sparse_linear import attribute, is_sparse_linear, to_tensor, walk

LEAST_ZEROS = 0.3
LEAST_ELEMENTS = 1 << 16


@dataclass(frozen=True, eq=False)
class Tunable:
    """A linear of the main graph.

    Args:
        name: Of its product, unique among them.
        product: The SparseLinear, MatMul or Gemm.
        x: What it reads.
        y: What comes out, bias included.
        absorbed: Nodes that belong to it: the transposition of its weight, the addition of its
            bias.
        constants: The initializers that only it reads.
        weight: The initializer of a dense weight.
        rows_first: Whether that is [rows, columns].
        bias: The initializer of its bias, or nothing.
    """

    name: str
    product: NodeProto
    x: str
    y: str
    absorbed: tuple[NodeProto, ...]
    constants: tuple[str, ...]
    weight: str = ""
    rows_first: bool = False
    bias: str = ""

    @property
    def is_sparse(self) -> bool:
        return is_sparse_linear(self.product)

    @property
    def layout(self) -> int:
        return attribute(self.product, "layout") if self.is_sparse else 0


def find_tunables(model: ModelProto) -> tuple[list[Tunable], int]:
    """Finds the linears that can run either way.

    Those are SparseLinear nodes, and products of an activation with a constant float32 matrix that
    has at least 30 % zeros and 64 Ki elements and is read by nothing else.

    Args:
        model: With its external data loaded.

    Returns:
        The linears, and the size of all linears of the main graph as float32.
    """
    return _Finder(model).find()


class _Finder:
    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        inputs = {value.name for value in model.graph.input}
        self._constants = {t.name: t for t in model.graph.initializer if t.name not in inputs}
        self._made_by = {name: node for node in model.graph.node for name in node.output}
        # Graphs within nodes read outer names, too.
        self._uses = Counter(name for node in walk(model.graph) for name in node.input)
        self._uses.update(value.name for value in model.graph.output)
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._names = Counter(node.name for node in model.graph.node)

    def find(self) -> tuple[list[Tunable], int]:
        found, elements = [], 0
        for node in self._graph.node:
            if is_sparse_linear(node):
                elements += attribute(node, "K") * attribute(node, "N")
                found.append(self._sparse(node))
                continue
            linear = self._dense(node)
            if linear is None:
                continue
            stored = self._constants[linear.weight]
            elements += int(np.prod(stored.dims))
            if self._alone(linear, node) and _is_worth_it(stored):
                found.append(linear)
        return found, elements * 4

    def _name(self, node: NodeProto) -> str:
        return node.name if node.name and self._names[node.name] == 1 else node.output[0]

    def _sparse(self, node: NodeProto) -> Tunable:
        own = [name for name in node.input[1:] if name in self._constants and self._uses[name] == 1]
        return Tunable(self._name(node), node, node.input[0], node.output[0], (), tuple(own))

    def _dense(self, node: NodeProto) -> Tunable | None:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            return None
        options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if any(options.get(name, value) != value for name, value in plain.items()):
            return None
        weight, rows_first = node.input[1], bool(options.get("transB", 0))
        absorbed: list[NodeProto] = []
        made = self._made_by.get(weight)
        if made is not None and made.op_type == "Transpose" and not made.domain:
            if self._uses[weight] == 1:
                absorbed.append(made)
            weight, rows_first = made.input[0], not rows_first
        stored = self._constants.get(weight)
        if stored is None or len(stored.dims) != 2 or stored.data_type != TensorProto.FLOAT:
            return None
        rows = stored.dims[0] if rows_first else stored.dims[1]
        bias, y = "", node.output[0]
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
            if not self._is_bias(bias, rows):
                return None
        elif (add := self._addition(y, rows)) is not None:
            absorbed.append(add)
            bias = add.input[1] if add.input[0] == y else add.input[0]
            y = add.output[0]
        own = [name for name in (weight, bias) if name and self._uses[name] == 1]
        return Tunable(
            self._name(node),
            node,
            node.input[0],
            y,
            tuple(absorbed),
            tuple(own),
            weight,
            rows_first,
            bias,
        )

    def _addition(self, y: str, rows: int) -> NodeProto | None:
        """The node that does nothing but add a bias to y."""
        readers = self._readers.get(y, [])
        if self._uses[y] != 1 or not readers or readers[0].op_type != "Add" or readers[0].domain:
            return None
        add = readers[0]
        other = add.input[1] if add.input[0] == y else add.input[0]
        return add if self._is_bias(other, rows) else None

    def _is_bias(self, name: str, rows: int) -> bool:
        stored = self._constants.get(name)
        return (
            stored is not None
            and list(stored.dims) == [rows]
            and stored.data_type == TensorProto.FLOAT
        )

    def _alone(self, linear: Tunable, node: NodeProto) -> bool:
        """Whether nothing else reads the weight: it would have to be kept beside the packed one."""
        return linear.weight in linear.constants and (
            linear.weight == node.input[1] or self._uses[node.input[1]] == 1
        )


def _is_worth_it(stored: TensorProto) -> bool:
    size = int(np.prod(stored.dims))
    if size < LEAST_ELEMENTS:
        return False
    return int(torch.count_nonzero(to_tensor(stored))) <= (1 - LEAST_ZEROS) * size
