"""The constant weights of an ONNX model: found, pruned, replaced, saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import torch
from onnx import numpy_helper

PATTERNS = ("50%", "2:4", "75%", "90%")
EXTERNAL_DATA_THRESHOLD = 4096
ALIGNMENT = 4096


@dataclass(frozen=True)
class ConstantLinear:
    """A MatMul with a constant matrix on the right, and the Add of a constant vector after it.

    Args:
        matmul: The node.
        weight: Name of the matrix [columns, rows].
        add: The node that adds the bias, if there is one that nothing else comes between.
        bias: Name of the vector [rows].
    """

    matmul: onnx.NodeProto
    weight: str
    add: onnx.NodeProto | None
    bias: str | None


def keep_mask(rows: int, columns: int, pattern: str, seed: int = 0) -> torch.Tensor:
    """Returns a random mask, bool [rows, columns], true where a weight is kept.

    Args:
        rows: Rows of the weight.
        columns: Its columns; the groups of 2:4 lie along them.
        pattern: The part that is pruned, such as "75%", or "2:4".
        seed: Of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    if pattern == "2:4":
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        return (order < 2).view(rows, columns)
    return torch.rand(rows, columns, generator=generator) >= float(pattern.rstrip("%")) / 100


def constant_linears(model: onnx.ModelProto, min_weights: int = 0) -> Iterator[ConstantLinear]:
    """Yields the linears of a graph, in its order; weights that several share are left out.

    Args:
        model: With its initializers in memory.
        min_weights: Smaller matrices are left out.
    """
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type != "MatMul" or len(shapes.get(node.input[1], [])) != 2:
            continue
        weight = node.input[1]
        if len(users[weight]) > 1 or np.prod(shapes[weight]) < min_weights:
            continue
        following = users.get(node.output[0], [])
        add, bias = None, None
        if len(following) == 1 and following[0].op_type == "Add":
            (other,) = (name for name in following[0].input if name != node.output[0])
            if shapes.get(other) == shapes[weight][1:]:
                add, bias = following[0], other
        yield ConstantLinear(node, weight, add, bias)


def fold_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turns MatMul(x, Transpose(W)) of an export into MatMul(x, W^T), in place; returns the model.

    ONNX Runtime does the same when it loads; here it makes every linear one node.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read = [name for node in model.graph.node for name in node.input]
    for node in [n for n in model.graph.node if n.op_type == "Transpose"]:
        tensor = tensors.get(node.input[0])
        if tensor is None or len(tensor.dims) != 2 or read.count(node.input[0]) > 1:
            continue
        array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(numpy_helper.from_array(array, node.output[0]))
        model.graph.node.remove(node)
    return model


def prune(model: onnx.ModelProto, pattern: str, min_weights: int = 0) -> int:
    """Sets random weights of every linear to zero, in place; returns how many linears there were."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for count, linear in enumerate(constant_linears(model, min_weights), 1):
        tensor = tensors[linear.weight]
        array = numpy_helper.to_array(tensor)
        columns, rows = array.shape
        keep = keep_mask(rows, columns, pattern, seed=count).numpy()
        tensor.CopyFrom(numpy_helper.from_array(np.where(keep.T, array, 0), linear.weight))
    return count


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes a model, its larger tensors aligned in `<stem>.data` beside it; returns the path.

    The tensors must be in memory. A session maps the file and uses them where they lie.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_suffix(".data")
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    with data.open("wb") as file:
        for tensor in graph.graph.initializer:
            raw = tensor.raw_data
            if len(raw) < EXTERNAL_DATA_THRESHOLD:
                continue
            file.write(bytes(-file.tell() % ALIGNMENT))
            onnx.external_data_helper.set_external_data(
                tensor, data.name, offset=file.tell(), length=len(raw)
            )
            file.write(raw)
            tensor.ClearField("raw_data")
    onnx.save_model(graph, str(path))
    return path


def save_with_layout(source: Path, layout: int, path: Path) -> Path:
    """Writes the model of another file with another layout of its sparse linears, same weights."""
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "SparseLinear" else ():
            if attribute.name == "layout":
                attribute.i = layout
    onnx.save_model(model, str(path))
    return path


def file_bytes(path: Path) -> int:
    """Returns the size of an ONNX file and of the data files that it refers to."""
    model = onnx.load(str(path), load_external_data=False)
    beside = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))


def torch_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Returns the initializers by name as torch has them: matrices as [rows, columns]."""
    weights = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        weights[tensor.name] = torch.from_numpy(
            np.array(array.T if array.ndim == 2 else array, order="C")
        )
    return weights
