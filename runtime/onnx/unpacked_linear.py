"""The ONNX form of `zeroskip::linear_24` and `bitmap_linear`: a plain product with a dense weight.

    linear_24(x, values, codes, bias)            ->  MatMul(x, Transpose(W)) [+ bias]
    bitmap_linear(x, bits, starts, values, bias) ->  MatMul(x, Transpose(W)) [+ bias]

W holds the zeros where they were, so what looks for 2:4 in dense initializers finds it. It is unpacked
when the initializer is written; the packed operands do not reach the file. Operands that the graph
computes are unpacked by standard operators instead, in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript.onnx_opset import opset18 as op
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

import zeroskip.ir.bitmap_linear  # noqa: F401  (registers the operator)
from zeroskip.ir.bitmap import BitmapWeight
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.linear_24 import read_weight
from zeroskip.ir.packing import Packing
from zeroskip.ir.program import attribute, holder
from zeroskip.runtime.onnx.skeleton import Skeleton

aten = torch.ops.aten
_LINEAR_24 = torch.ops.zeroskip.linear_24.default
_BITMAP_LINEAR = torch.ops.zeroskip.bitmap_linear.default
OPERANDS: Mapping[Any, tuple[str, ...]] = {
    _LINEAR_24: ("values", "codes"),
    _BITMAP_LINEAR: ("bits", "starts", "values"),
}


class UnpackedWeights(Mapping[str, torch.Tensor]):
    """Weights, and dense ones that are unpacked each time they are read.

    Args:
        weights: What there is already.
        unpacked: Name to what makes the tensor; these hide `weights` of the same name.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        unpacked: Mapping[str, Callable[[], torch.Tensor]],
    ) -> None:
        self._weights, self._unpacked = weights, unpacked

    def __getitem__(self, name: str) -> torch.Tensor:
        made = self._unpacked.get(name)
        return self._weights[name] if made is None else made()

    def __contains__(self, name: object) -> bool:
        return name in self._unpacked or name in self._weights

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._weights if name not in self._unpacked)
        yield from self._unpacked

    def __len__(self) -> int:
        return sum(1 for _ in self)


def unpack_linears(
    skeleton: Skeleton, weights: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Rewrites products with constant packed operands to `aten.linear` with a dense parameter.

    Nothing is loaded. The parameter has the name and the orientation of the one that was packed, if
    the node says (`Packing`); else the name of the values without `_values`, and [out, in]. Where
    the graph reads that name already, `_dense` is added to the name of the values.

    Args:
        skeleton: Its graph is changed in place.
        weights: Hold the operands that are not buffers of the skeleton.

    Returns:
        The weights, and the dense ones.
    """
    module, graph = skeleton.graph_module, skeleton.graph_module.graph
    nodes = [node for node in graph.nodes if node.target in OPERANDS]
    if not nodes:
        return weights
    mode = detect_fake_mode(pytree.tree_leaves(skeleton.example_inputs))
    assert mode is not None
    taken = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    dense: dict[tuple[Any, ...], str] = {}
    unpacked: dict[str, Callable[[], torch.Tensor]] = {}
    for node in nodes:
        packed = _Packed.of(node)  # Not earlier: its input may have been replaced just now.
        if any(operand.op != "get_attr" for operand in packed.operands.values()):
            continue
        if packed.key not in dense:
            name = packed.name if packed.name not in taken else f"{packed.values}_dense"
            taken.add(name)
            dense[packed.key] = name
            unpacked[name] = packed.loader(module, weights)
            with mode:
                hollow = torch.empty(packed.shape, dtype=torch.float32, device="cpu")
            owner, leaf = holder(module, name)
            owner.register_parameter(leaf, torch.nn.Parameter(hollow, False))
        packed.replace(dense[packed.key])
    _drop_unread(module)
    return UnpackedWeights(weights, unpacked)


@dataclass(frozen=True, eq=False)
class _Packed:
    """A product with a packed weight, and what the weight is when it is dense.

    Args:
        operands: What the weight is packed in, by name.
        packing: The parameter that was packed, if that is known.
    """

    node: fx.Node
    x: fx.Node
    operands: Mapping[str, fx.Node]
    bias: fx.Node | None
    rows: int
    columns: int
    packing: Packing | None

    @classmethod
    def of(cls, node: fx.Node) -> _Packed:
        assert isinstance(node.target, torch._ops.OpOverload)
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
        given.update(node.kwargs)
        x = cast("fx.Node", given["x"])
        operands = {name: cast("fx.Node", given[name]) for name in OPERANDS[node.target]}
        bias = cast("fx.Node | None", given.get("bias"))
        rows, columns = (int(of.meta["val"].shape[-1]) for of in (node, x))
        packing = node.meta.get("packing")
        known = packing if isinstance(packing, Packing) else None
        return cls(node, x, operands, bias, rows, columns, known)

    @property
    def values(self) -> str:
        return str(self.operands["values"].target)

    @property
    def name(self) -> str:
        """The name that the dense weight is to have."""
        return self.packing.parameter if self.packing else self.values.removesuffix("_values")

    @property
    def transposed(self) -> bool:
        return self.packing is not None and self.packing.transposed

    @property
    def shape(self) -> tuple[int, int]:
        sizes = (self.rows, self.columns)
        return sizes[::-1] if self.transposed else sizes

    @property
    def key(self) -> tuple[Any, ...]:
        """What products with the same dense weight have in common."""
        return (*(node.target for node in self.operands.values()), self.name, self.shape)

    def loader(
        self, module: fx.GraphModule, weights: Mapping[str, torch.Tensor]
    ) -> Callable[[], torch.Tensor]:
        """Returns what loads the operands and unpacks them."""
        buffers = {
            name: attribute(module, str(node.target))
            for name, node in self.operands.items()
            if node.target not in weights
        }

        def load() -> torch.Tensor:
            operands = {}
            for name, node in self.operands.items():
                held = buffers[name] if name in buffers else weights[str(node.target)]
                # Buffers of the skeleton are widened, but fragments have 16 bits.
                dtype = node.meta["val"].dtype if "val" in node.meta else held.dtype
                operands[name] = held.detach().cpu().to(dtype)
            weight = self._unpack(**operands)
            return weight.T if self.transposed else weight

        return load

    def _unpack(self, **operands: torch.Tensor) -> torch.Tensor:
        if self.node.target is _LINEAR_24:
            return read_weight(**operands, rows=self.rows, columns=self.columns).unpack()
        return BitmapWeight(**operands, columns=self.columns).unpack()

    def replace(self, name: str) -> None:
        """Puts a product with a dense parameter in place of this one."""
        graph = self.node.graph
        with graph.inserting_before(self.node):
            weight = graph.get_attr(name)
            if self.transposed:
                weight = graph.call_function(aten.t.default, (weight,))
            product = graph.call_function(aten.linear.default, (self.x, weight, self.bias))
        product.meta = dict(self.node.meta)
        self.node.replace_all_uses_with(product)
        graph.erase_node(self.node)


def _drop_unread(module: fx.GraphModule) -> None:
    """Takes what the graph no longer reads out of the module, which would be exported with it."""
    dead = [node for node in module.graph.find_nodes(op="get_attr") if not node.users]
    for node in dead:
        module.graph.erase_node(node)
    read = {node.target for node in module.graph.find_nodes(op="get_attr")}
    for name in {str(node.target) for node in dead} - read:
        owner, leaf = holder(module, name)
        delattr(owner, leaf)
    module.graph.lint()
    module.recompile()


def unpacking_translation() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Returns the onnxscript functions for operands that the graph computes, by operator."""
    return {_LINEAR_24: _linear_24, _BITMAP_LINEAR: _bitmap_linear}


def _linear_24(x: Any, values: Any, codes: Any, bias: Any = None, rows: int = 0) -> Any:
    if len(values.shape) != 2:
        raise LoweringError(
            "the graph computes the fragments of a linear_24",
            next_step="give it the canonical form, or fragments that are weights or buffers",
        )
    held, half = (int(size) for size in values.shape)
    groups = half // 2
    whole: Any = op.Cast(codes, to=onnx_ir.DataType.INT32)
    column = op.Unsqueeze(whole, _ints(-1))
    pair = op.Concat(op.Mod(column, _number(16)), op.Div(column, _number(16)), axis=-1)
    line = op.Reshape(pair, _ints(held, 2 * -(-groups // 2)), allowzero=1)
    nibbles = op.Unsqueeze(op.Slice(line, _ints(0), _ints(groups), _ints(1)), _ints(-1))
    first, second = op.Mod(nibbles, _number(4)), op.Div(nibbles, _number(4))
    pairs = op.Reshape(values, _ints(held, groups, 2), allowzero=1)
    early = op.Slice(pairs, _ints(0), _ints(1), _ints(2))
    late = op.Slice(pairs, _ints(1), _ints(2), _ints(2))
    places = _number([0, 1, 2, 3])
    rest = op.Where(op.Equal(second, places), late, _zero(values))
    dense = op.Where(op.Equal(first, places), early, rest)
    return _product(x, op.Reshape(dense, _ints(held, 4 * groups), allowzero=1), bias)


def _bitmap_linear(x: Any, bits: Any, starts: Any, values: Any, bias: Any = None) -> Any:
    # starts stay unread: the values of a row follow those of the row before.
    rows, words = (int(size) for size in bits.shape)
    positive = op.Mod(op.Cast(bits, to=onnx_ir.DataType.INT64), _number(1 << 32, np.int64))
    powers = _number([1 << place for place in range(32)], np.int64)
    spread = op.Mod(op.Div(op.Unsqueeze(positive, _ints(-1)), powers), _number(2, np.int64))
    line = op.Reshape(spread, _ints(-1))
    places = op.Sub(op.CumSum(line, _number(0, np.int64)), _number(1, np.int64))
    kept: Any = op.Cast(line, to=onnx_ir.DataType.BOOL)
    dense = op.Where(kept, op.Gather(values, places), _zero(values))
    padded = op.Reshape(dense, _ints(rows, 32 * words), allowzero=1)
    weight = op.Slice(padded, _ints(0), _ints(int(x.shape[-1])), _ints(1))
    return _product(x, weight, bias)


def _product(x: Any, weight: Any, bias: Any) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _number(value: int | list[int], dtype: type[np.signedinteger[Any]] = np.int32) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _zero(like: Any) -> Any:
    zero: Any = op.Constant(value_float=0.0)
    return op.CastLike(zero, like)
