"""What the key/value cache of a model looks like, read from what the model returns when it runs.

Nothing is taken from the class or the configuration of the model: multi-query attention, head widths
of their own and layers of different shapes all show in the cache itself.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, DynamicLayer

from zeroskip.ir.capture import cache_set_to
from zeroskip.ir.errors import LoweringError

BATCH, SEQUENCE = 2, 3
"""The size of the probe: different, and neither 0 nor 1, which `torch.export` would specialise."""


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
        with same_mode(model), caching(model), torch.no_grad():
            ids = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
            output = model(input_ids=ids, use_cache=True)
    # The forward is foreign code: whatever it raises means that it cannot generate from tokens alone.
    except Exception as error:
        raise _refusal(model, f"running it on tokens alone failed: {error}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != (BATCH, SEQUENCE):
        raise _refusal(model, "it returns no logits of shape [batch, sequence, vocabulary]")
    cache = getattr(output, "past_key_values", None)
    layers: list[Any] = list(getattr(cache, "layers", []))
    if not isinstance(cache, Cache) or not layers:
        raise _refusal(model, "it returns no key/value cache")
    shapes = tuple(_layer_shape(model, number, layer) for number, layer in enumerate(layers))
    return CacheGeometry(
        shapes, layers[0].keys.dtype, "position_ids" in accepted, int(logits.shape[2])
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


def same_mode(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Returns the fake mode of a skeleton's parameters: tensors of two modes do not mix."""
    for parameter in model.parameters():
        if isinstance(parameter, FakeTensor):
            return parameter.fake_mode
    return contextlib.nullcontext()


def caching(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Runs a block with `use_cache=True` on every configuration of the model."""
    return cache_set_to(True, model)
