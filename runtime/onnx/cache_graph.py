"""One graph for prefill and decode of a causal language model: plain tensors in, plain tensors out.

A Hugging Face model keeps its key/value cache in Python objects, which no file format can hold. The
capture rebuilds such a cache from plain tensors inside the traced function, so that one graph with a
dynamic past length serves the prefill (past length 0) and every decode step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zeroskip.ir.errors import LoweringError
from zeroskip.runtime.onnx.cache_geometry import (
    BATCH,
    SEQUENCE,
    CacheGeometry,
    caching,
    read_geometry,
    same_mode,
)

PAST = 5
"""Of the example that is traced; the other sizes are those of the probe."""


@dataclass(frozen=True, eq=False)
class CacheGraph:
    """A captured causal language model with its cache as inputs and outputs.

    Args:
        graph_module: Unlifted graph; called with the keywords of `example_inputs` it returns the
            logits [batch, sequence, vocabulary] and the list of (key, value) of every layer.
        example_inputs: What it was traced at; `past_key_values` is a list of (key, value).
        dynamic_shapes: The dynamic axes, in the structure of `example_inputs`.
        input_names: Flat names in the order of the flattened inputs.
        output_names: Flat names in the order of the flattened outputs.
        geometry: The shape of the cache.
    """

    graph_module: torch.fx.GraphModule
    example_inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    geometry: CacheGeometry


def capture_with_cache(model: nn.Module) -> CacheGraph:
    """Captures a causal language model as one graph that serves prefill and decode.

    Parameter names in the graph are the model's own. Layers with a sliding window keep the whole
    cache; their mask still applies the window. The model is left as it was, also after a failure.

    Args:
        model: In evaluation mode; live, or a skeleton whose parameters are CPU FakeTensors.

    Raises:
        LoweringError: The model is not a causal language model with a plain cache, or
            `torch.export` refuses it.
    """
    geometry = read_geometry(model)
    with same_mode(model):
        example = _example_inputs(geometry)
    shapes = _dynamic_shapes(geometry)
    try:
        # Outside no_grad, the no_grad blocks of rotary embeddings become submodules of the graph.
        with _plain_forward(model), caching(model), torch.no_grad():
            exported = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise LoweringError(
            f"torch.export cannot trace {type(model).__name__} with its cache: {error}",
            where="capture_with_cache",
            next_step="export the plain form (form='plain'), or report the model",
        ) from error
    # The guards would refuse batch 1, one token and an empty past, all of which the graph computes.
    graph_module = exported.module(check_guards=False)
    graph_module._forward_pre_hooks.clear()
    graph_module._forward_pre_hooks_with_kwargs.clear()
    _unify_names(graph_module, model)
    plain_inputs = [name for name in example if name != "past_key_values"]
    return CacheGraph(
        graph_module,
        example,
        shapes,
        (*plain_inputs, *geometry.past_names()),
        ("logits", *geometry.present_names()),
        geometry,
    )


@contextlib.contextmanager
def _plain_forward(model: nn.Module) -> Iterator[None]:
    """Gives the model a forward on plain tensors for as long as the block runs.

    Replacing the forward of the instance, rather than wrapping the model in another module, keeps
    every parameter and module name in the graph equal to the model's own.
    """
    original = model.forward
    previous = model.__dict__.get("forward")

    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        cache = DynamicCache()
        for key, value in past_key_values or ():
            # A plain layer even under a sliding window: cropping the cache depends on its length.
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        return output.logits, [
            (layer.keys, layer.values) for layer in output.past_key_values.layers
        ]

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if previous is not None:
            model.__dict__["forward"] = previous


def _unify_names(graph_module: torch.fx.GraphModule, model: nn.Module) -> None:
    """Reads a tied parameter under the first name that the model lists for it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(graph_module.named_parameters(remove_duplicate=False))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = first.get(id(every.get(str(node.target))))
        if name in every:
            node.target = name
    graph_module.recompile()


def _example_inputs(geometry: CacheGeometry) -> dict[str, Any]:
    example: dict[str, Any] = {
        "input_ids": torch.ones(BATCH, SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long),
    }
    if geometry.takes_positions:
        positions = torch.arange(PAST, PAST + SEQUENCE)
        example["position_ids"] = positions.repeat(BATCH, 1)
    example["past_key_values"] = geometry.empty(BATCH, PAST)
    return example


def _dynamic_shapes(geometry: CacheGeometry) -> dict[str, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    tokens, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    shapes: dict[str, Any] = {"input_ids": tokens, "attention_mask": tokens}
    if geometry.takes_positions:
        shapes["position_ids"] = tokens
    shapes["past_key_values"] = [(cache, cache) for _ in geometry.layers]
    return shapes
