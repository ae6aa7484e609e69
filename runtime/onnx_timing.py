"""Times packed linears in a chain as ONNX Runtime runs them: as nodes of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.onnx.sparse_linear import make_sparse_linear
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, VERSION
from zeroskip.runtime.timing import clock

_INSTRUCTION_SET = "ZEROSKIP_INSTRUCTION_SET"


class OnnxSparseChain:
    """Products of one input with one packed weight after another, in one ONNX Runtime session.

    What a node of a custom operator costs ONNX Runtime is part of their time, as it is in a model.
    There every node is met once in a while, and what belongs to it has left the caches.

    Args:
        weight: Its tensors are copied.
        layout: Of the nodes.
        accuracy_level: Of the nodes.
        copies: How many nodes there are, each with tensors of its own.
        threads: Threads within an operator.
        library: The file of the kernel library.
        instruction_set: The most that its kernels may use; by default what the user allows.
    """

    def __init__(
        self,
        weight: BitmaskWeight,
        layout: int,
        accuracy_level: int,
        copies: int,
        threads: int,
        library: str,
        instruction_set: str | None = None,
    ) -> None:
        self.copies = copies
        self._clock = clock(threads)
        made = make_sparse_linear(
            weight, "X", "Y", name="W", accuracy_level=accuracy_level, layout=layout
        )
        nodes, outputs, stubs, names = [], [], [], []
        # The session uses these arrays in place.
        self._arrays: list[np.ndarray] = []
        values = []
        for i in range(copies):
            node = onnx.NodeProto()
            node.CopyFrom(made.node)
            node.name, node.output[0] = f"W{i}", f"Y{i}"
            for j, name in enumerate(node.input[1:], start=1):
                node.input[j] = f"{i}.{name}" if name else ""
            # Only a row leaves the graph, so that the products share a buffer as in a model.
            nodes.append(node)
            nodes.append(helper.make_node("Gather", [f"Y{i}", "zero"], [f"Z{i}"]))
            outputs.append(helper.make_tensor_value_info(f"Z{i}", 1, [weight.rows]))
            for tensor in made.initializers:
                stub = onnx.TensorProto(
                    name=f"{i}.{tensor.name}", data_type=tensor.data_type, dims=tensor.dims
                )
                stub.data_location = onnx.TensorProto.EXTERNAL
                stub.external_data.add(key="location", value="memory")
                stubs.append(stub)
                names.append(stub.name)
                array = _raw(tensor)
                self._arrays.append(array)
                values.append(
                    onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
                )
        zero = helper.make_tensor("zero", onnx.TensorProto.INT64, [], [0])
        x = helper.make_tensor_value_info("X", 1, ["m", weight.columns])
        graph = helper.make_graph(nodes, "chain", [x], outputs, [*stubs, zero])
        imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Its threads must not be spinning while the other side is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(library)
        options.add_external_initializers(names, values)
        with _allowed(instruction_set):
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

    def seconds(self, x: torch.Tensor) -> float:
        """Runs all on x, float32 [m, columns]; returns the time of one."""
        array = x.numpy()
        begin = self._clock()
        self._session.run(None, {"X": array})
        return (self._clock() - begin) / self.copies


def _raw(tensor: onnx.TensorProto) -> np.ndarray:
    """A copy of a tensor's data, of a type that NumPy has."""
    kind: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if kind.itemsize == 2:
        kind = np.dtype(np.uint16)  # NumPy has no bfloat16, and the bits are all that counts.
    return np.frombuffer(tensor.raw_data, kind).reshape(tuple(tensor.dims)).copy()


@contextmanager
def _allowed(instruction_set: str | None) -> Iterator[None]:
    """Lets the kernels of sessions that are made within use no more than that."""
    if instruction_set is None:
        yield
        return
    before = os.environ.get(_INSTRUCTION_SET)
    os.environ[_INSTRUCTION_SET] = instruction_set
    try:
        yield
    finally:
        if before is None:
            del os.environ[_INSTRUCTION_SET]
        else:
            os.environ[_INSTRUCTION_SET] = before
