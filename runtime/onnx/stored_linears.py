"""The linears of an ONNX file as they are stored: packed, or dense with so many zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.formats import PADDING
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, OP

GROUP = 4


@dataclass(frozen=True)
class StoredLinear:
    """One product of an activation with a constant.

    Args:
        name: Of its weight.
        shape: (out, in).
        is_packed: Whether it is a SparseLinear.
        dtype: Of its values.
        density: Share of its weights that are stored, or are not zero.
        bytes: Of its tensors.
        dense_bytes: Of the same as float32.
        is_24: Whether no four weights along the inputs hold more than two; None where packed, where
            it does not matter.
    """

    name: str
    shape: tuple[int, int]
    is_packed: bool
    dtype: str
    density: float
    bytes: int
    dense_bytes: int
    is_24: bool | None


def stored_linears(path: Path) -> list[StoredLinear]:
    """Reads the linears of a file; one weight is in memory at a time.

    Args:
        path: An ONNX file.

    Raises:
        ArtifactError: It cannot be read, or its data is missing or cut short.
    """
    try:
        model = onnx_ir.load(path)
        return list(_linears(model.graph))
    # Parsers raise errors of their own, derived from nothing more specific.
    except Exception as error:
        raise _unreadable(path, error) from error


def check_readable(path: Path) -> None:
    """Checks that a file can be parsed and that its data is all there; reads no weight.

    Raises:
        ArtifactError: It is not so.
    """
    try:
        for value in onnx_ir.load(path).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, onnx_ir.ExternalTensor):
                end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
                if Path(tensor.path).stat().st_size < end:
                    raise ValueError(f"{tensor.location} is cut short")
    except Exception as error:  # As in `stored_linears`.
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"the model cannot be read: {error}",
        where=str(path),
        next_step="the file may be truncated or its .data file missing; export it again",
    )


def _linears(graph: onnx_ir.Graph) -> Iterator[StoredLinear]:
    for node in graph.all_nodes():
        if (node.domain, node.op_type) == (DOMAIN, OP):
            yield _packed(node)
        elif not node.domain and node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1:
            found = _dense(node)
            if found is not None:
                yield found


def _packed(node: onnx_ir.Node) -> StoredLinear:
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    tensors = [value.const_value for value in node.inputs[1:5] if value is not None]
    values = tensors[2]
    assert values is not None
    kept = int(np.prod(values.shape.numpy())) - PADDING
    name = str(node.inputs[1].name if node.inputs[1] is not None else node.name)
    return StoredLinear(
        name.removesuffix("bitmask").rstrip("._"),
        (rows, columns),
        True,
        values.dtype.name.lower(),
        kept / max(rows * columns, 1),
        sum(tensor.nbytes for tensor in tensors if tensor is not None),
        4 * rows * columns,
        None,
    )


def _dense(node: onnx_ir.Node) -> StoredLinear | None:
    value = node.inputs[1]
    rows_first = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        value, rows_first = producer.inputs[0], not rows_first
    constant = None if value is None or value.is_graph_input() else value.const_value
    if constant is None or len(constant.shape) != 2:
        return None
    array = constant.numpy()
    matrix = array if rows_first else array.T
    zeros = matrix != 0
    rows, columns = matrix.shape
    is_24 = columns % GROUP == 0 and _keeps_two_of_four(zeros)
    found = StoredLinear(
        str(value.name) if value is not None else "",
        (rows, columns),
        False,
        constant.dtype.name.lower(),
        int(zeros.sum()) / max(zeros.size, 1),
        constant.nbytes,
        4 * rows * columns,
        bool(is_24),
    )
    if isinstance(constant, onnx_ir.ExternalTensor):
        del array, matrix
        constant.release()  # otherwise every weight that was read stays mapped
    return found


def _keeps_two_of_four(kept: np.ndarray) -> bool:
    groups = kept.reshape(kept.shape[0], -1, GROUP).sum(-1, dtype=np.int8)
    return not bool((groups > 2).any())
