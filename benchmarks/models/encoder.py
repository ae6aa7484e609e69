"""An encoder of the shape of BERT-base: attention, LayerNorm after the sum, GELU; random weights.

It starts at the embeddings. The ONNX form is written as older exporters wrote it, operator by
operator, because DeepSparse has to read it too; ONNX Runtime fuses LayerNorm and GELU again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from torch.nn import functional

from models.graph import GraphBuilder


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of an encoder."""

    layers: int = 4
    width: int = 768
    heads: int = 12
    hidden: int = 3072


def encoder_model(
    shape: EncoderShape, *, batch: int | str, sequence: int | str, opset: int = 18
) -> onnx.ModelProto:
    """Returns the dense model: input `x` [batch, sequence, width] to `output` of the same shape.

    Args:
        shape: The sizes.
        batch: A number, or the name of a free axis.
        sequence: The same; DeepSparse wants numbers.
        opset: 13 (DeepSparse) or 18.
    """
    graph = GraphBuilder(opset)
    width, head = shape.width, shape.width // shape.heads
    root = graph.constant("root", head**0.5)
    x = graph.input("x", [batch, sequence, width])
    for layer in range(shape.layers):
        name = f"layers.{layer}"

        def project(x: str, part: str, order: list[int], name: str = name) -> str:
            y = graph.linear(x, f"{name}.{part}", width, width, bias=True)
            return graph.split_heads(y, [0, 0, shape.heads, head], order)

        query = project(x, "query", [0, 2, 1, 3])
        key = project(x, "key", [0, 2, 3, 1])
        value = project(x, "value", [0, 2, 1, 3])
        scores = graph.node("Div", [graph.node("MatMul", [query, key]), root])
        mixed = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), value])
        merged = graph.merge_heads(mixed, width)
        attended = graph.linear(merged, f"{name}.output", width, width, bias=True)
        x = _layer_norm(graph, graph.node("Add", [attended, x]), f"{name}.norm1", width)
        inner = graph.linear(x, f"{name}.up", width, shape.hidden, bias=True)
        outer = graph.linear(_gelu(graph, inner), f"{name}.down", shape.hidden, width, bias=True)
        x = _layer_norm(graph, graph.node("Add", [outer, x]), f"{name}.norm2", width)
    return graph.finish("encoder", x, [batch, sequence, width])


def encoder_in_torch(
    weights: Mapping[str, torch.Tensor], shape: EncoderShape, x: torch.Tensor
) -> torch.Tensor:
    """Runs the same in torch, with the weights of `torch_weights`."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (shape.heads, -1)).transpose(1, 2)

    size = (shape.width,)
    for layer in range(shape.layers):
        name = f"layers.{layer}"
        parts = (heads(linear(x, f"{name}.{part}")) for part in ("query", "key", "value"))
        mixed = functional.scaled_dot_product_attention(*parts)
        attended = linear(mixed.transpose(1, 2).flatten(2), f"{name}.output")
        x = functional.layer_norm(attended + x, size, eps=1e-12)
        inner = functional.gelu(linear(x, f"{name}.up"))
        x = functional.layer_norm(linear(inner, f"{name}.down") + x, size, eps=1e-12)
    return x


def _layer_norm(graph: GraphBuilder, x: str, name: str, width: int) -> str:
    centred = graph.node("Sub", [x, graph.mean(x)])
    squares = graph.node("Pow", [centred, graph.constant("two", 2)])
    variance = graph.node("Add", [graph.mean(squares), graph.constant("epsilon", 1e-12)])
    normal = graph.node("Div", [centred, graph.node("Sqrt", [variance])])
    scaled = graph.node("Mul", [normal, graph.constant(f"{name}.weight", [1.0] * width)])
    return graph.node("Add", [scaled, graph.constant(f"{name}.bias", [0.0] * width)])


def _gelu(graph: GraphBuilder, x: str) -> str:
    error = graph.node("Erf", [graph.node("Div", [x, graph.constant("root_two", 2**0.5)])])
    total = graph.node("Add", [error, graph.constant("one", 1)])
    return graph.node("Mul", [graph.node("Mul", [x, total]), graph.constant("half", 0.5)])
