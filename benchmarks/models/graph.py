"""Writes an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHT_SCALE = 0.02
# The versions of the file format and of opset 13 that DeepSparse reads; 18 is the other choice.
IR_VERSIONS = {13: 7, 18: 9}

Shape = Sequence[int | str]


class GraphBuilder:
    """A graph in the making; every method returns the name of what it made.

    Args:
        opset: Version of the standard operators, 13 or 18.
        seed: Of the weights.
    """

    def __init__(self, opset: int = 18, seed: int = 0) -> None:
        self.opset = opset
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Shape) -> str:
        """A float32 input."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(kind, inputs, [name], name=f"{name}_node", **attributes)
        )
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """An initializer; a name that is there already is the same constant."""
        if name not in self._initializers:
            array = np.asarray(value, dtype=dtype)
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def linear(self, x: str, name: str, columns: int, rows: int, *, bias: bool) -> str:
        """X W^T (+ b) as exporters write it: a MatMul with W^T [columns, rows], and an Add."""
        weight = self._random.standard_normal((columns, rows), dtype=np.float32) * WEIGHT_SCALE
        y = self.node("MatMul", [x, self.constant(f"{name}.weight", weight)])
        if not bias:
            return y
        offset = self._random.standard_normal(rows, dtype=np.float32) * WEIGHT_SCALE
        return self.node("Add", [y, self.constant(f"{name}.bias", offset)])

    def mean(self, x: str) -> str:
        """The mean over the last axis, which is kept."""
        if self.opset < 18:
            return self.node("ReduceMean", [x], axes=[-1], keepdims=1)
        axes = self.constant("last_axis", [-1], np.int64)
        return self.node("ReduceMean", [x, axes], keepdims=1)

    def split_heads(self, x: str, shape: Sequence[int], order: Sequence[int]) -> str:
        """[batch, sequence, width] to [batch, sequence, heads, head width], then transposed."""
        target = self.constant("heads_" + "_".join(map(str, shape)), shape, np.int64)
        return self.node("Transpose", [self.node("Reshape", [x, target])], perm=list(order))

    def merge_heads(self, x: str, width: int) -> str:
        """[batch, heads, sequence, head width] to [batch, sequence, width]."""
        target = self.constant("merged", [0, 0, width], np.int64)
        return self.node("Reshape", [self.node("Transpose", [x], perm=[0, 2, 1, 3]), target])

    def finish(self, name: str, output: str, shape: Shape) -> onnx.ModelProto:
        """The model, whose one output is called `output`."""
        self._nodes.append(helper.make_node("Identity", [output], ["output"], name="last"))
        graph = helper.make_graph(
            self._nodes,
            name,
            self._inputs,
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSIONS[self.opset],
        )
