"""One graph for prefill and decode of a causal language model: plain tensors in, plain tensors out.

A Hugging Face model keeps its key/value cache in Python objects, which no file format can hold. The
capture rebuilds such a cache from plain tensors inside the traced function, so that one graph with a
dynamic past length serves the prefill (past length 0) and every decode step. The geometry of the
cache is read from what the model returns when it runs, never from its class or its configuration.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from zeroskip.ir.errors import LoweringError

BATCH, SEQUENCE, PAST = 2, 3, 5
"""The example the graph is traced at: all different and none 0 or 1, which export would specialise."""


@dataclass(frozen=True)
class LayerShape:
    """Heads and head width of the keys and of the values that one layer keeps."""

    key: tuple[int, int]
    value: tuple[int, int]


@dataclass(frozen=True)
class CacheGeometry:
    """What the key/value cache of a model looks like, layer by layer."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    takes_positions: bool
    vocabulary: int

    def past_names(self) -> list[str]:
        """Returns `past_key_values.N.key` and `.value` for every layer, in order."""
        return [
            f"past_key_values.{n}.{k}" for n in range(len(self.layers)) for k in ("key", "value")
        ]

    def present_names(self) -> list[str]:
        """Returns `present.N.key` and `.value` for every layer, in order."""
        return [f"present.{n}.{k}" for n in range(len(self.layers)) for k in ("key", "value")]

    def empty(self, batch: int, past: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns a zero cache: per layer a key and a value of shape [batch, heads, past, width]."""

        def zeros(shape: tuple[int, int]) -> torch.Tensor:
            return torch.zeros(batch, shape[0], past, shape[1], dtype=self.dtype)

        return [(zeros(layer.key), zeros(layer.value)) for layer in self.layers]


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


def is_causal_lm(model: nn.Module) -> bool:
    """Returns whether the model, run on a few tokens, answers with logits and a plain cache."""
    try:
        read_geometry(model)
    except LoweringError:
        return False
    return True


def read_geometry(model: nn.Module) -> CacheGeometry:
    """Runs the model once on a tiny input and reads the layers of the cache that it returns.

    Raises:
        LoweringError: The model takes no cache, returns none, or keeps something else than one key
            and one value per layer (a recurrent state, an encoder-decoder cache).
    """
    accepted = inspect.signature(model.forward).parameters
    absent = [n for n in ("input_ids", "attention_mask", "past_key_values") if n not in accepted]
    if absent:
        raise _refusal(model, f"its forward takes no {', '.join(absent)}")
    _require_traceable(model)
    try:
        with _same_mode(model), _use_cache(model), torch.no_grad():
            ids = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
            output = model(input_ids=ids, use_cache=True)
    # The forward is foreign code: whatever it raises means that it cannot generate from tokens alone.
    except Exception as error:
        raise _refusal(model, f"running it on tokens alone failed: {error}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != (BATCH, SEQUENCE):
        raise _refusal(model, "it returns no logits of shape [batch, sequence, vocabulary]")
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, Cache) or not getattr(cache, "layers", None):
        raise _refusal(model, "it returns no key/value cache")
    shapes = tuple(_layer_shape(model, number, layer) for number, layer in enumerate(cache.layers))
    return CacheGeometry(
        shapes, cache.layers[0].keys.dtype, "position_ids" in accepted, int(logits.shape[2])
    )


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
    with _same_mode(model):
        example = _example_inputs(geometry)
    shapes = _dynamic_shapes(geometry)
    try:
        # Outside no_grad, the no_grad blocks of rotary embeddings become submodules of the graph.
        with _plain_forward(model), _use_cache(model), torch.no_grad():
            exported = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise LoweringError(
            f"torch.export cannot trace {type(model).__name__} with its cache: {error}",
            where="capture_with_cache",
            next_step="export the plain form (form='plain'), or report the model",
        ) from error
    # The guards would refuse batch 1, one token and an empty past, all of which the graph computes.
    graph_module = cast("torch.fx.GraphModule", exported.module(check_guards=False))
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


def _refusal(model: nn.Module, reason: str) -> LoweringError:
    return LoweringError(
        f"{type(model).__name__} cannot be exported with a cache: {reason}",
        where="read_geometry",
        next_step="export the plain form (form='plain'), which needs no cache",
    )


def _require_traceable(model: nn.Module) -> None:
    if model.training:
        raise LoweringError(
            "the model is in training mode, so dropout would be exported",
            where=type(model).__name__,
            next_step="call model.eval() first",
        )
    # A meta device would be written into the graph as a constant.
    meta = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    if meta:
        raise LoweringError(
            f"{len(meta)} parameters are on the meta device",
            where=meta[0],
            next_step="load the weights, or use FakeTensors on the CPU in their place",
        )


def _layer_shape(model: nn.Module, number: int, layer: Any) -> LayerShape:
    shapes = []
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if not isinstance(layer, DynamicLayer) or not isinstance(tensor, torch.Tensor):
            raise _refusal(
                model, f"layer {number} keeps a {type(layer).__name__}, not one key and value"
            )
        if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2]) != (BATCH, SEQUENCE):
            raise _refusal(model, f"layer {number} keeps {name} of shape {tuple(tensor.shape)}")
        shapes.append((int(tensor.shape[1]), int(tensor.shape[3])))
    return LayerShape(*shapes)


def _same_mode(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Returns the fake mode of a skeleton's parameters: tensors of two modes do not mix."""
    for parameter in model.parameters():
        if isinstance(parameter, FakeTensor):
            return parameter.fake_mode
    return contextlib.nullcontext()


@contextlib.contextmanager
def _use_cache(model: nn.Module) -> Iterator[None]:
    """Sets `use_cache` on the configuration of every submodule (T5 copies its own); restores it."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        for config, _ in saved:
            config.use_cache = True
        yield
    finally:
        for config, value in saved:
            config.use_cache = value


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
            layer = DynamicLayer()
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
