"""The ONNX form of `zeroskip::masked_linear`: a plain product with a weight that holds the zeros.

    masked_linear(x, weight, bits, bias)  ->  MatMul(x, Transpose(weight')) [+ bias]

with weight' = weight where bits keep it, 0 elsewhere, computed when the initializer is written. The
bits themselves do not reach the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from onnxscript.onnx_opset import opset18 as op

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import unpack_bits


def masked_linear_operator() -> Any | None:
    """Returns the operator, or None as long as nothing has registered it."""
    packet = getattr(torch.ops.zeroskip, "masked_linear", None)
    return None if packet is None else packet.default


def masked_linear_translation() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Returns the onnxscript function of the operator, by operator; empty if it is not registered."""
    operator = masked_linear_operator()
    return {} if operator is None else {operator: _masked_linear}


def _masked_linear(x: Any, weight: Any, mask_bits: Any, bias: Any = None) -> Any:
    # mask_bits stays unread: binding the weight applies it.
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


@dataclass(frozen=True)
class MaskedWeights:
    """The masks that a graph puts on its weights, and which weights it also reads unmasked.

    Args:
        bits: Weight name -> packed mask, and whether it is over the transposed weight.
        shared: Names that some other node reads without the mask.
    """

    bits: Mapping[str, tuple[torch.Tensor, bool]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight with its mask applied; the weight itself where it has none.

        Raises:
            LoweringError: The weight is also read unmasked, and the mask would change it.
        """
        if name not in self.bits:
            return weight
        # masked_fill, not a product: 0 * inf is NaN and -1 * 0 is -0.
        bits, transposed = self.bits[name]
        keep = (
            unpack_bits(bits, weight.shape[::-1]).T
            if transposed
            else unpack_bits(bits, weight.shape)
        )
        masked = weight.masked_fill(~keep, 0)
        if name in self.shared and not torch.equal(masked, weight):
            raise LoweringError(
                f"{name!r} is masked in one place and read unmasked in another (a tied weight)",
                where=name,
                next_step="write the zeros into the weight before lowering, or leave it unpruned",
            )
        return masked


def masked_weights(graph_module: torch.fx.GraphModule) -> MaskedWeights:
    """Reads which weights of a skeleton are masked, and by what.

    Args:
        graph_module: Masks are buffers with data; tied weights have one name.

    Raises:
        LoweringError: A mask or a masked weight is computed in the graph, or one weight has two masks.
    """
    operator = masked_linear_operator()
    bits: dict[str, tuple[torch.Tensor, bool]] = {}
    masked_reads: set[tuple[torch.fx.Node, torch.fx.Node]] = set()
    for node in graph_module.graph.nodes:
        if operator is None or node.target is not operator:
            continue
        named = {**dict(zip(("x", "weight", "mask_bits"), node.args, strict=False)), **node.kwargs}
        weight, mask = named["weight"], named["mask_bits"]
        # Conv1D stores [in, out]: its weight reaches the operator through a transpose.
        transposed = weight.target is torch.ops.aten.t.default
        stored = weight.args[0] if transposed else weight
        if stored.op != "get_attr" or mask.op != "get_attr":
            raise LoweringError(
                f"{node.name}: the weight or the mask of a masked_linear is computed in the graph",
                where=node.name,
                next_step="lower only linears whose weight is a parameter",
            )
        value = graph_module.get_buffer(str(mask.target))
        known, known_transposed = bits.setdefault(str(stored.target), (value, transposed))
        if known_transposed != transposed or not torch.equal(known, value):
            raise LoweringError(
                f"{stored.target!r} carries two different masks",
                where=node.name,
                next_step="give a weight that is read twice one mask",
            )
        masked_reads.add((stored, weight if transposed else node))
    shared = {
        str(node.target)
        for node in graph_module.graph.find_nodes(op="get_attr")
        if any((node, user) not in masked_reads for user in node.users)
    }
    return MaskedWeights(bits, frozenset(shared & bits.keys()))
