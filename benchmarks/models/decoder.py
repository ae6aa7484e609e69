"""A small decoder like LLaMA, one step with a key/value cache: RMS norm, attention, gated SiLU.

It starts at the embeddings and has no head, no rotary positions and no mask: what is left is what
weights cost. All layers share one cache, which is an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from torch.nn import functional

from models.graph import GraphBuilder

EPSILON = 1e-6


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder."""

    layers: int = 6
    width: int = 2048
    heads: int = 16
    hidden: int = 5632


def decoder_model(shape: DecoderShape) -> onnx.ModelProto:
    """Returns the dense model.

    Inputs `x` [1, sequence, width], `past_key` and `past_value` [1, heads, past, width / heads];
    `output` [1, sequence, width].
    """
    graph = GraphBuilder()
    width, head = shape.width, shape.width // shape.heads
    cache = [1, shape.heads, "past", head]
    scale = graph.constant("scale", head**-0.5)
    x = graph.input("x", [1, "sequence", width])
    past_key, past_value = (graph.input(name, cache) for name in ("past_key", "past_value"))
    for layer in range(shape.layers):
        name = f"layers.{layer}"
        normal = _rms_norm(graph, x, f"{name}.norm1", width)
        query, key, value = (
            graph.split_heads(
                graph.linear(normal, f"{name}.{part}", width, width, bias=False),
                [0, 0, shape.heads, head],
                [0, 2, 1, 3],
            )
            for part in ("query", "key", "value")
        )
        keys = graph.node("Concat", [past_key, key], axis=2)
        values = graph.node("Concat", [past_value, value], axis=2)
        scores = graph.node("MatMul", [query, graph.node("Transpose", [keys], perm=[0, 1, 3, 2])])
        shares = graph.node("Softmax", [graph.node("Mul", [scores, scale])], axis=-1)
        merged = graph.merge_heads(graph.node("MatMul", [shares, values]), width)
        attended = graph.linear(merged, f"{name}.output", width, width, bias=False)
        x = graph.node("Add", [x, attended])
        normal = _rms_norm(graph, x, f"{name}.norm2", width)
        gate = graph.linear(normal, f"{name}.gate", width, shape.hidden, bias=False)
        up = graph.linear(normal, f"{name}.up", width, shape.hidden, bias=False)
        silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
        product = graph.node("Mul", [silu, up])
        down = graph.linear(product, f"{name}.down", shape.hidden, width, bias=False)
        x = graph.node("Add", [x, down])
    return graph.finish("decoder", x, [1, "sequence", width])


def decoder_in_torch(
    weights: Mapping[str, torch.Tensor],
    shape: DecoderShape,
    x: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
) -> torch.Tensor:
    """Runs the same in torch, with the weights of `torch_weights`."""
    size = (shape.width,)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (shape.heads, -1)).transpose(1, 2)

    for layer in range(shape.layers):
        name = f"layers.{layer}"
        normal = functional.rms_norm(x, size, eps=EPSILON)
        query, key, value = (
            heads(linear(normal, f"{name}.{part}")) for part in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(
            query, torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        )
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{name}.output")
        normal = functional.rms_norm(x, size, eps=EPSILON)
        gated = functional.silu(linear(normal, f"{name}.gate")) * linear(normal, f"{name}.up")
        x = x + linear(gated, f"{name}.down")
    return x


def _rms_norm(graph: GraphBuilder, x: str, name: str, width: int) -> str:
    square = graph.mean(graph.node("Mul", [x, x]))
    variance = graph.node("Add", [square, graph.constant("epsilon", EPSILON)])
    factor = graph.node("Reciprocal", [graph.node("Sqrt", [variance])])
    normal = graph.node("Mul", [x, factor])
    return graph.node("Mul", [normal, graph.constant(f"{name}.weight", [1.0] * width)])
