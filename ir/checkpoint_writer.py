"""Writes the weights of a Program as a Hugging Face checkpoint that plain transformers reloads.

What comes out is an ordinary dense checkpoint (pruned weights are stored as zeros) with the keys
that `save_pretrained` would write. No sparsity_config is ever written: vLLM refuses what it does
not know there.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from zeroskip.ir.checkpoint import CONFIG, INDEX, parameter_names, read_json
from zeroskip.ir.checkpoint_keys import Conversion, Converted, sources_by_key
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import new_folder
from zeroskip.ir.weights import InMemory, Source, Weights

# Beside the weights a checkpoint holds the config, generation config, tokenizer and processor.
COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe"}
_NOT_OURS = ("sparsity_config", "compression_config", "quantization_config")


def save_checkpoint(
    source_directory: Path | None,
    weights: Weights,
    model: nn.Module,
    directory: Path,
    max_shard_bytes: int = 2**30,
) -> None:
    """Writes a checkpoint; `from_pretrained(directory)` gives exactly these weights.

    One shard is in memory at a time. The directory appears when it is complete, or not at all.

    Args:
        source_directory: Checkpoint to copy the config, generation config and tokenizer from;
            without one, the configs are those of the model and there is no tokenizer.
        weights: Every parameter of the model, tied ones under their first name.
        model: The transformers model that the names belong to; only its structure, config and
            buffers are used, so the skeleton of `open_checkpoint` will do.
        directory: Must not exist, or be empty.
        max_shard_bytes: A larger checkpoint is split; a single larger tensor is not.

    Raises:
        ArtifactError: The weights are not those of the model, or the directory is in use or
            cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArtifactError(
            f"{type(model).__name__} is not a transformers model and has no checkpoint format",
            next_step="save its state_dict with safetensors",
        )
    _check_weights(model, weights)
    with new_folder(directory) as temporary:
        _write_companions(source_directory, model, _main_dtype(weights), temporary)
        _write_shards(sources_by_key(model, _state(model, weights)), temporary, max_shard_bytes)


def _check_weights(model: PreTrainedModel, weights: Weights) -> None:
    expected = {names[0]: parameter for parameter, names in parameter_names(model)}
    if odd := sorted(expected.keys() ^ weights.keys()):
        raise ArtifactError(
            "the model has no such parameter" if odd[0] in weights else "the weights lack it",
            where=odd[0],
            next_step="pass the Weights that belong to this model, tied ones under one name",
        )
    for name, parameter in expected.items():
        source = weights.source(name)
        if (source.shape, source.dtype) != (parameter.shape, parameter.dtype):
            raise ArtifactError(
                f"the weight is {source.dtype} {list(source.shape)}, the model loads it as"
                f" {parameter.dtype} {list(parameter.shape)}",
                where=name,
                next_step="cast or reshape it to what the model expects",
            )


def _state(model: PreTrainedModel, weights: Weights) -> dict[str, Source]:
    """Returns what `save_pretrained` saves, by name: persistent buffers too, ties once."""
    # transformers compares meta tensors by the parameter they stand for: ties are found by name.
    state = {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta")
        for name, t in model.state_dict().items()
    }
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    first = {name: names[0] for _, names in parameter_names(model) for name in names}
    buffers = dict(model.named_buffers())
    return {
        name: weights.source(first[name]) if name in first else InMemory(buffers[name])
        for name in remove_tied_weights_from_state_dict(state, model)
    }


def _main_dtype(weights: Weights) -> str:
    """Returns the name of the floating-point dtype that most weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for source in map(weights.source, weights):
        sizes[source.dtype] += source.shape.numel() * source.dtype.is_floating_point
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def _write_companions(
    source: Path | None, model: PreTrainedModel, dtype: str, directory: Path
) -> None:
    architecture = type(model).__name__
    if source is None:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [architecture], dtype
        config.save_pretrained(directory)
        generation: Any = model.generation_config if model.can_generate() else None
        if generation is not None:
            generation.save_pretrained(directory)
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in COMPANIONS and not path.name.endswith(INDEX[-11:]):
            shutil.copyfile(path, directory / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, directory / path.name)
    # The config of a live model may be changed by now (use_cache): the file is the original.
    raw = read_json(source / CONFIG)
    kept = {key: value for key, value in raw.items() if key not in _NOT_OURS}
    kept["architectures"] = [architecture]
    kept |= _added_biases(model, raw)
    # Older programs read the older key: it stays where it was.
    kept |= dict.fromkeys({"dtype", "torch_dtype"} & raw.keys() or {"dtype"}, dtype)
    (directory / CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _added_biases(model: PreTrainedModel, raw: Mapping[str, Any]) -> dict[str, bool]:
    """What the configuration says about biases that the model was given since it was loaded."""
    before, now = type(model.config).from_dict(dict(raw)).to_dict(), model.config.to_dict()
    options = [key for key, value in now.items() if value is True and "bias" in key]
    return {key: True for key in options if before.get(key) is False}


def _write_shards(keyed: Mapping[str, Source], directory: Path, max_shard_bytes: int) -> None:
    split: Any = split_torch_state_dict_into_shards(
        {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in keyed.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for filename, keys in split.filename_to_tensors.items():
        save_file(_load(keyed, keys), directory / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _load(keyed: Mapping[str, Source], keys: list[str]) -> dict[str, Tensor]:
    shard: dict[str, Tensor] = {}
    running: Conversion | None = None
    made: dict[str, Tensor] = {}
    for key in keys:
        source = keyed[key]
        if isinstance(source, Converted):
            # The tensors of one conversion follow each other: it runs once per shard.
            if source.conversion is not running:
                running, made = source.conversion, source.conversion.load()
            tensor = made[source.name]
        else:
            tensor = source.load()
        # safetensors wants dense tensors that share no memory; slices of one conversion do.
        shard[key] = torch.empty(source.shape, dtype=source.dtype, device="cpu").copy_(tensor)
    return shard
