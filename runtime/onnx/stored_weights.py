"""The weights that an ONNX file holds, one at a time, packed ones unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch

from zeroskip.ir.errors import ArtifactError, CompileError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.onnx.sparse_linear import check_weight
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, INPUTS, OP
from zeroskip.runtime.onnx.tensors import to_torch

_PARTS = INPUTS[1:5]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight of an ONNX file.

    Args:
        tensor: Reads it: packed ones as float32 [out, in], others as they are stored.
        is_scaled: It is packed as int8 values and scales.
    """

    tensor: Callable[[], torch.Tensor]
    is_scaled: bool = False


def stored_weights(path: Path) -> Iterator[tuple[str, StoredWeight]]:
    """Yields the name and the reader of each weight.

    A packed weight has the name of the parameter that it was packed from, as far as the names of its
    operands tell.

    Raises:
        ArtifactError: The file cannot be read, or operands contradict each other.
    """
    try:
        yield from _stored(onnx_ir.load(path))
    except CompileError:
        raise
    # Parsers and external tensors raise errors of their own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"the model cannot be read: {error}", where=str(path), next_step="export it again"
        ) from error


def _stored(model: onnx_ir.Model) -> Iterator[tuple[str, StoredWeight]]:
    packed: set[str] = set()
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) != (DOMAIN, OP):
            continue
        parts = {
            part: value.const_value
            for part, value in zip(_PARTS, node.inputs[1:5], strict=False)
            if value is not None and value.const_value is not None
        }
        packed |= {str(tensor.name) for tensor in parts.values()}
        name = str(node.inputs[1].name) if node.inputs[1] is not None else ""
        if missing := sorted(set(_PARTS[:3]) - parts.keys()):
            raise ArtifactError(
                f"{missing[0]} of {node.name} is no constant", next_step="export the model again"
            )
        yield name.removesuffix(f"_{_PARTS[0]}"), _packed(node, parts)
    for name, value in model.graph.initializers.items():
        if name not in packed and value.const_value is not None:
            yield name, _dense(value.const_value)


def _dense(constant: onnx_ir.TensorProtocol) -> StoredWeight:
    return StoredWeight(lambda: to_torch(constant))


def _packed(node: onnx_ir.Node, parts: dict[str, onnx_ir.TensorProtocol]) -> StoredWeight:
    is_int8 = parts["values"].dtype == onnx_ir.DataType.INT8
    columns, rows, block_size = (
        node.attributes[key].as_int() if key in node.attributes else 0
        for key in ("K", "N", "block_size")
    )

    def unpack() -> torch.Tensor:
        weight = BitmaskWeight(
            to_torch(parts["bitmask"]),
            to_torch(parts["row_offsets"]),
            to_torch(parts["values"]),
            to_torch(parts["scales"]) if is_int8 and "scales" in parts else None,
            columns,
            block_size,
        )
        check_weight(weight, rows, str(node.name))
        return weight.unpack()

    return StoredWeight(unpack, is_int8)
