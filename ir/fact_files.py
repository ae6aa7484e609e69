"""Facts, and where weights live, as plain JSON values and tensors; and back, exactly.

A file names classes, and only those listed here are ever made from it. An object or a tensor that
several places share is written once and shared again when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zeroskip.ir.biases import BiasShift, ShiftedBiases
from zeroskip.ir.budgets import Budgets, Measurements
from zeroskip.ir.channel_groups import ChannelAxis
from zeroskip.ir.channel_permutation import Permutation, PermutedChannels, Reordered
from zeroskip.ir.checkpoint_keys import Cast
from zeroskip.ir.elastic import Elastic, ElasticLinear
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.facts import Lowered, Mask, Masks, QuantizedValues, Roles, SparseWeights
from zeroskip.ir.folding import Fold, FoldedScales, Scaled
from zeroskip.ir.formats import Rounded, ValueFormat
from zeroskip.ir.induction import Induced, Outcome
from zeroskip.ir.patterns import NM, Block, Unstructured
from zeroskip.ir.reconstruction import Distilled, Reconstructed, Reconstruction
from zeroskip.ir.scale_groups import Consumer, Member, Refusal, ScaleGroup, ScaleGroups, Shift
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers, Statistics, Steering
from zeroskip.ir.weight_energy import Compensated, Compensation
from zeroskip.ir.weights import Masked, Source

FACTS = (
    Budgets,
    Compensated,
    Distilled,
    Elastic,
    FoldedScales,
    Induced,
    Lowered,
    Masks,
    Measurements,
    PermutedChannels,
    QuantizedValues,
    Reconstructed,
    Roles,
    ScaleGroups,
    ScoreMultipliers,
    ShiftedBiases,
    SparseWeights,
    Statistics,
)
_WRAPPERS = (Cast, Masked, Reordered, Rounded, Scaled)
_PARTS = (
    *(BiasShift, Block, ChannelAxis, Compensation, Consumer, EdgeStatistics, ElasticLinear, Fold),
    *(Mask, Member, NM, Outcome, Permutation, Reconstruction, Refusal, ScaleGroup, Shift, Steering),
    *(Unstructured, ValueFormat),
)
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (*FACTS, *_WRAPPERS, *_PARTS)}
_PLAIN = (bool, int, str, type(None))


class NotStorableError(Exception):
    """A value cannot be written so that reading gives the same: whoever needs it computes it again."""


class Encoder:
    """Turns values into JSON; tensors, and objects that may be shared, are collected on the way.

    Args:
        known: Objects that the reader will have, by the name it has them under; they are named, not
            written.
    """

    def __init__(self, known: Mapping[str, object]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.sources: dict[str, Source] = {}
        self.objects: list[Any] = []
        self._known = {id(value): name for name, value in known.items()}
        self._seen: dict[int, Any] = {}
        self._alive: list[object] = []  # An id is that of another object once its own is gone.

    def encode(self, value: Any) -> Any:
        """Returns plain JSON values.

        Raises:
            NotStorableError: Something in it has none.
        """
        if id(value) in self._known:
            return {"known": self._known[id(value)]}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return {"tuple": [self.encode(item) for item in value]}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, frozenset):
            return {"set": [self.encode(item) for item in sorted(value)]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": [[key, self.encode(item)] for key, item in value.items()]}
        return self._shared(value)

    def _shared(self, value: Any) -> Any:
        if id(value) not in self._seen:
            self._alive.append(value)
            self._seen[id(value)] = self._new(value)
        return self._seen[id(value)]

    def _new(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(self.tensors))
            self.tensors[name] = storable(value)
            return {"tensor": name}
        if CLASSES.get(type(value).__name__) is type(value):
            found = {
                field.name: self.encode(getattr(value, field.name))
                for field in dataclasses.fields(value)
            }
            self.objects.append({"class": type(value).__name__, "fields": found})
            return {"object": len(self.objects) - 1}
        if isinstance(value, Source):
            name = str(len(self.sources))
            self.sources[name] = value
            return {"source": name}
        raise NotStorableError(f"a {type(value).__qualname__} has no form in files")


def storable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that a file can hold: plain, contiguous, sharing memory with no other."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise NotStorableError(f"a tensor on {tensor.device}, {tensor.layout}")
    return tensor.clone(memory_format=torch.contiguous_format)


class Decoder:
    """Turns what `Encoder` wrote into values again.

    Args:
        objects: What it collected.
        tensors: Those of the file.
        sources: Where the file's weights are.
        known: As it was given to the encoder.
    """

    def __init__(
        self,
        objects: list[Any],
        tensors: Mapping[str, torch.Tensor],
        sources: Mapping[str, Source],
        known: Mapping[str, object],
    ) -> None:
        self._readers: dict[str, Any] = {
            "known": known.__getitem__,
            "tensor": tensors.__getitem__,
            "source": sources.__getitem__,
            "object": lambda index: self._objects[index],
            "float": float,
            "dtype": _dtype,
            "size": torch.Size,
            "tuple": lambda items: tuple(self._value(item) for item in items),
            "set": lambda items: frozenset(self._value(item) for item in items),
            "dict": lambda items: {key: self._value(item) for key, item in items},
        }
        self._objects: list[Any] = []
        with _refusing_damage():
            for entry in objects:  # An object stands behind all that it is made of.
                fields = {key: self._value(item) for key, item in entry["fields"].items()}
                self._objects.append(CLASSES[entry["class"]](**fields))

    def decode(self, value: Any) -> Any:
        """Returns the value.

        Raises:
            ArtifactError: No encoder wrote this.
        """
        with _refusing_damage():
            return self._value(value)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return self._readers[kind](content)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return found


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    """Whatever wrong data makes Python raise is one problem: these are not what an encoder wrote."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"stored facts cannot be read: {error!r}") from error
