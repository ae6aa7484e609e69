"""A model with SparseLinear nodes, written again with plain MatMul and dense float32 weights.

For runtimes without the kernels: a function body gives the same numbers, but it unpacks all weights
at once when the model is loaded, which takes many times their memory.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import onnx_ir
import torch

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.onnx.folder import PROTOBUF_LIMIT
from zeroskip.runtime.onnx.sparse_linear import check_weight
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, INPUTS, OP
from zeroskip.runtime.onnx.tensors import to_torch

BESIDE = 1 << 30
"""From as many bytes of weights on, they go to a file of their own."""


def densify(model_path: str | Path, out_path: str | Path, *, external_from: int = BESIDE) -> int:
    """Writes a model with every SparseLinear as MatMul and Add; returns how many there were.

    One weight is in memory at a time when they go to a file of their own, `<out_path>.data`. The
    files appear complete or not at all. Int8 values are multiplied by their scales; activations are
    no longer rounded where accuracy_level was 4.

    Args:
        model_path: An ONNX file.
        out_path: The file to write; it must not exist.
        external_from: Bytes of weights from which on they get a file of their own.

    Raises:
        ArtifactError: The model cannot be read, its weights are not constants or contradict each
            other, or out_path exists.
    """
    source, target = Path(model_path), Path(out_path)
    data = target.with_name(f"{target.name}.data")
    for file in (target, data):
        if file.exists():
            raise ArtifactError(
                "the target already exists", where=str(file), next_step="remove it, or name another"
            )
    try:
        model = onnx_ir.load(source)
    # Parsers raise errors of their own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"the model cannot be read: {error}", where=str(source), next_step="export it again"
        ) from error
    try:
        nodes = [node for node in model.graph.all_nodes() if _is_sparse_linear(node)]
        for node in nodes:
            _replace(model, node)
        _remove_operator(model)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    except ArtifactError:
        raise
    except Exception as error:
        raise _unreadable(error, source) from error
    external = size > min(external_from, PROTOBUF_LIMIT)

    work = target.with_name(f".{target.name}.{os.getpid()}")
    work.mkdir(parents=True)
    try:
        if external:
            onnx_ir.save(model, work / target.name, external_data=data.name, alignment=4096)
        else:
            onnx_ir.external_data.load_to_model(model)
            onnx_ir.save(model, work / target.name)
        # The model comes last: whoever sees it finds its data.
        for name in (data.name, target.name) if external else (target.name,):
            os.replace(work / name, target.with_name(name))
    except ArtifactError:
        raise
    # A damaged model is read here, lazily: onnx_ir raises whatever its numbers lead to, wrapped once
    # for every level of the file.
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ArtifactError, OSError)):
            cause = cause.__cause__
        if isinstance(cause, ArtifactError):
            raise cause from None
        raise _unreadable(cause or error, source) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(nodes)


def _unreadable(error: BaseException, source: Path) -> ArtifactError:
    return ArtifactError(
        f"the model cannot be read, or written anew: {error}",
        where=str(source),
        next_step="export it again, or free space where it is to go",
    )


def _is_sparse_linear(node: onnx_ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == OP


def _replace(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    name = node.name or f"{node.outputs[0].name}.{OP}"
    parts: dict[str, onnx_ir.TensorProtocol] = {}
    for part, value in zip(INPUTS[1:], node.inputs[1:], strict=False):
        if value is None or part == "bias":
            continue
        if value.const_value is None or not value.is_initializer() or value.is_graph_input():
            raise ArtifactError(
                f"{part} of {name} is not a constant of the graph",
                where=value.name,
                next_step="only constant weights can be made dense",
            )
        parts[part] = value.const_value
    rows, columns, block_size = (_attribute(node, key) for key in ("N", "K", "block_size"))
    make = partial(_dense, parts, rows, columns, block_size, name)
    weight = onnx_ir.Value(
        name=f"{name}.dense",
        shape=onnx_ir.Shape([columns, rows]),
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        const_value=onnx_ir.LazyTensor(
            make, onnx_ir.DataType.FLOAT, onnx_ir.Shape([columns, rows]), name=f"{name}.dense"
        ),
    )
    model.graph.register_initializer(weight)

    bias = node.inputs[5] if len(node.inputs) > 5 else None
    product = onnx_ir.node("MatMul", [node.inputs[0], weight], name=f"{name}.MatMul")
    new = [product]
    if bias is not None and not _is_zero(bias):
        new.append(onnx_ir.node("Add", [product.outputs[0], bias], name=f"{name}.Add"))
    old = node.outputs[0]
    for value in node.inputs[1:5] if len(node.inputs) > 4 else node.inputs[1:]:
        if value is not None:
            _forget(model, node, value)
    if bias is not None and len(new) == 1:
        _forget(model, node, bias)
    assert node.graph is not None
    onnx_ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], new, [old], [new[-1].outputs[0]]
    )


def _forget(model: onnx_ir.Model, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    # Another node may share the constant.
    if all(user is node for user, _ in value.uses()) and not value.is_graph_output():
        model.graph.initializers.pop(str(value.name), None)


def _is_zero(bias: onnx_ir.Value) -> bool:
    constant = bias.const_value
    return constant is not None and bias.is_initializer() and not constant.numpy().any()


def _dense(
    parts: dict[str, onnx_ir.TensorProtocol], rows: int, columns: int, block_size: int, name: str
) -> onnx_ir.TensorProtocol:
    bitmask, offsets, values = (to_torch(parts[part]) for part in INPUTS[1:4])
    scales = parts.get("scales")
    is_int8 = values.dtype == torch.int8
    weight = BitmaskWeight(
        bitmask,
        offsets,
        values,
        to_torch(scales) if scales is not None and is_int8 else None,
        columns,
        block_size,
    )
    check_weight(weight, rows, name)
    return onnx_ir.tensor(weight.unpack().T.contiguous().numpy(), name=f"{name}.dense")


def _attribute(node: onnx_ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _remove_operator(model: onnx_ir.Model) -> None:
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] == OP]:
        del model.functions[key]
    others = {node.domain for node in model.graph.all_nodes()} | {key[0] for key in model.functions}
    if DOMAIN not in others:
        model.opset_imports.pop(DOMAIN, None)
        model.graph.opset_imports.pop(DOMAIN, None)
