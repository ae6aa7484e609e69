"""The two ways between the keys of a Hugging Face checkpoint and the names of a model's state.

Keys are not names since transformers 5: prefixes were renamed, and experts are stored one by one
but used as one 3-D tensor. `sources_by_name` and `sources_by_key` follow transformers' own table
(`transformers.conversion_mapping`) as `from_pretrained` and `save_pretrained` do, on sources in
place of tensors: nothing is read until a source is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.weights import Source

Parts = list[tuple[str, Source]]


@dataclass(frozen=True, eq=False)
class Cast:
    """A source in another dtype than it is stored in."""

    source: Source
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    def load(self) -> Tensor:
        return self.source.load().to(self.dtype)


@dataclass(frozen=True, eq=False)
class Conversion:
    """One application of a transformers weight converter to tensors that are not loaded yet.

    Args:
        converter: What to do; a template that is never changed.
        target: The first name that it produces.
        parts: What goes in: the pattern of the converter that each source matched, in order.
        model: The model that the names belong to; some converters look at its shapes.
    """

    converter: WeightConverter
    target: str
    parts: tuple[tuple[str, Source], ...]
    model: PreTrainedModel

    def load(self) -> dict[str, Tensor]:
        """Returns every tensor that comes out, by name."""
        return self._convert(lambda source: source.load())

    def describe(self) -> dict[str, Tensor]:
        """Returns what `load` would, as meta tensors, reading nothing.

        Raises:
            ArtifactError: The parts do not fit together.
        """
        try:
            return self._convert(
                lambda source: torch.empty(source.shape, dtype=source.dtype, device="meta")
            )
        # The converters check little: what does not fit ends in any of torch's errors.
        except Exception as error:
            raise ArtifactError(
                f"{len(self.parts)} tensors do not fit together: {error}",
                where=self.target,
                next_step="the checkpoint is incomplete or of another model; fetch it again",
            ) from error

    def _convert(self, read: Callable[[Source], Tensor]) -> dict[str, Tensor]:
        converter: Any = copy.deepcopy(self.converter)
        for pattern, source in self.parts:
            # transformers takes functions where it loads from disk without threads.
            converter.add_tensor(self.target, pattern, pattern, partial(read, source))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


@dataclass(frozen=True, eq=False)
class Converted:
    """One of the tensors that a conversion makes; the conversion runs on every load."""

    conversion: Conversion
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        return self.conversion.load()[self.name]


def sources_by_name(
    model: PreTrainedModel, stored: Mapping[str, Source]
) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Translates the keys of a checkpoint to names of the model, as `from_pretrained` does.

    Args:
        model: Gets a note of the transforms that were used, for the way back.
        stored: The tensors of the checkpoint by key.

    Returns:
        Sources by name in the model's state dict and in the dtype there, and the keys that the
        model has no place for.

    Raises:
        ArtifactError: Tensors that make up one parameter do not fit together.
    """
    transforms = get_model_conversion_mapping(model)
    renamings, converters, converter_of = _by_kind(transforms)
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Source] = {}
    parts: dict[str, Parts] = {}
    unused: list[str] = []
    rename: Any = rename_source_key
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename(key, renamings, converters, prefix, state)
        # A rule that does not know this key: the key may be a name already.
        if name not in state and key in state:
            name, pattern = rename(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
            continue
        source, dtype = stored[key], state[name].dtype
        source = source if source.dtype == dtype else Cast(source, dtype)
        if pattern is None:
            sources.setdefault(name, source)
        else:
            parts.setdefault(name, []).append((pattern, source))
    for name, group in parts.items():
        conversion = Conversion(converter_of[group[0][0]], name, tuple(group), model)
        for made, tensor in conversion.describe().items():
            sources[made] = Converted(conversion, made, tensor.shape, tensor.dtype)
    remember: Any = model
    remember._weight_conversions = [t for t in transforms if t.was_used()]
    return sources, tuple(unused)


def sources_by_key(model: PreTrainedModel, named: Mapping[str, Source]) -> dict[str, Source]:
    """Translates names of the model to keys of a checkpoint, as `save_pretrained` does.

    Args:
        model: Where it remembers the transforms that it was loaded with, those are reverted.
        named: Sources by name in the model's state dict.
    """
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        # A model that was never loaded has no prefix of an old checkpoint to restore.
        every = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [t for t in every if not isinstance(t, PrefixChange)]
    back = [transform.reverse_transform() for transform in reversed(transforms)]
    renamings, converters, converter_of = _by_kind(back)
    plain: dict[str, Source] = {}
    parts: dict[str, Parts] = {}
    for name in sorted(named, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        if pattern is None:
            plain[apply_renamings(name, renamings)] = named[name]
        else:
            parts.setdefault(target, []).append((pattern, named[name]))
    for target, group in parts.items():
        conversion = Conversion(converter_of[group[0][0]], target, tuple(group), model)
        for made, tensor in conversion.describe().items():
            key = apply_renamings(made, renamings)
            plain[key] = Converted(conversion, made, tensor.shape, tensor.dtype)
    return plain


def _by_kind(
    transforms: list[Any],
) -> tuple[list[WeightRenaming], list[WeightConverter], dict[str, WeightConverter]]:
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return renamings, converters, {p: c for c in converters for p in c.source_patterns}
