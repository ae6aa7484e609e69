"""A Hugging Face checkpoint directory as a model whose weights stay on disk.

`open_checkpoint` builds the model class that `config.json` names around parameters that hold no
memory, and finds for each of them where its numbers are in the safetensors shards.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import guard_torch_init_functions
from transformers.utils.loading_report import LoadStateDictInfo

from zeroskip.ir.checkpoint_keys import sources_by_name
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.weights import OnDisk, Source, Weights

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MOST_LAYERS = 10_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_QUANTIZED = ("quantization_config", "compression_config")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model without its weights, and where the weights are.

    Args:
        directory: The checkpoint.
        model: The model in eval mode. Its parameters are fake tensors on the CPU (a shape and a
            dtype, no memory); its buffers are real.
        weights: Every parameter by fully qualified name, tied ones under their first name only.
        fake_mode: The mode of the parameters; make the example inputs of a capture under it.
        unused: Keys of the checkpoint that the model has no place for.
    """

    directory: Path
    model: PreTrainedModel
    weights: Weights
    fake_mode: FakeTensorMode
    unused: tuple[str, ...]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a Hugging Face checkpoint directory without reading its weights.

    The dtype is the one that `from_pretrained(dtype="auto")` gives: that of the config, else the
    first floating-point one in the file.

    Raises:
        ArtifactError: A file is missing, damaged, not safetensors or quantized; or the checkpoint
            lacks a parameter of the model or has it in another shape.
    """
    config = _read_config(directory)
    check_layers(config, directory)
    stored = _read_headers(directory)
    floating = [s.dtype for s in stored.values() if s.dtype.is_floating_point]
    dtype: Any = config.dtype or (floating or [torch.float32])[0]
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    model_class = _model_class(config, directory)
    try:
        model = _skeleton(model_class, config, dtype, fake_mode)
    # Any constructor of transformers runs here: odd configs and missing extras end in any error.
    except Exception as error:
        raise ArtifactError(
            f"{model_class.__name__} cannot be built without its weights: {error}",
            where=str(directory / CONFIG),
            next_step="if from_pretrained loads it, compile that live model instead",
        ) from error
    if model.can_generate() and (generation := directory / GENERATION).exists():
        model.generation_config = _read_generation(generation)
    sources, unused = sources_by_name(model, stored)
    _fill_buffers(model, sources, directory)
    weights = Weights(
        {
            names[0]: _one_source(names, parameter, sources, directory)
            for parameter, names in parameter_names(model)
        }
    )
    return Checkpoint(directory, model, weights, fake_mode, unused)


def parameter_names(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Returns every parameter once, with all of its names in the order of `named_parameters`."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(names.values())


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or raises an ArtifactError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"cannot read {path.name}: {error}",
            where=str(path),
            next_step="fetch the file again; a checkpoint directory needs it",
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{path.name} holds a {type(content).__name__}, not an object", where=str(path)
        )
    return content


def _read_config(directory: Path) -> PretrainedConfig:
    raw = read_json(directory / CONFIG)
    for part in (raw, *raw.values()):
        if isinstance(part, dict) and any(part.get(key) for key in _QUANTIZED):
            raise ArtifactError(
                "the checkpoint is quantized",
                where=str(directory / CONFIG),
                next_step="start from the checkpoint before quantization, and quantize last",
            )
    if (directory / "adapter_config.json").exists():
        raise ArtifactError(
            "the directory holds an adapter, which would be left out",
            where=str(directory / "adapter_config.json"),
            next_step="merge the adapter into the model and save that",
        )
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    # transformers raises ValueError, KeyError, OSError and its own validation errors here.
    except Exception as error:
        raise ArtifactError(
            f"transformers cannot read the config: {error}",
            where=str(directory / CONFIG),
            next_step="check model_type; models with code of their own are not loaded from disk",
        ) from error
    return config


def _read_generation(path: Path) -> transformers.GenerationConfig:
    raw = read_json(path)
    try:
        return transformers.GenerationConfig.from_dict(raw)
    # transformers checks values one by one, each with an error of its own.
    except Exception as error:
        raise ArtifactError(
            f"transformers cannot read {path.name}: {error}",
            where=str(path),
            next_step="fetch the file again, or remove it: it only says how to generate",
        ) from error


def check_layers(config: PretrainedConfig, directory: Path) -> None:
    """Refuses a config with more layers than can be built: building takes time for each of them.

    Raises:
        ArtifactError: Names the entry.
    """
    for key, value in config.to_dict().items():
        counted = "layer" in key or "expert" in key
        if counted and isinstance(value, int) and value > _MOST_LAYERS:
            raise ArtifactError(
                f"{key} is {value}, and no model has so many",
                where=str(directory / CONFIG),
                next_step="fetch the config again; it does not belong to these weights",
            )


def _model_class(config: PretrainedConfig, directory: Path) -> type[PreTrainedModel]:
    names = config.architectures
    name = str(names[0]) if isinstance(names, list) and names else None
    # Parts of models (WhisperEncoder) are saved but not exported at the top of transformers.
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    found = getattr(transformers, name, None) if name else None
    if name and found is None and module.startswith("transformers.models."):
        found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ArtifactError(
            f"transformers has no model class {name!r}",
            where=str(directory / CONFIG),
            next_step="set architectures to the class that the checkpoint was saved from",
        )
    return found


def refuse_pickles(directory: Path) -> None:
    """Refuses a folder without safetensors, such as one whose weights are a pickle.

    Raises:
        ArtifactError: Says how to convert it.
    """
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return
    pickled = sorted(path for end in _PICKLES for path in directory.glob(f"*{end}"))
    raise ArtifactError(
        f"{pickled[0].name} is a pickle, which runs code when it is read"
        if pickled
        else f"there is neither {SINGLE} nor {INDEX}",
        where=str(directory),
        next_step="load it where you trust it and save_pretrained it: that writes safetensors",
    )


def read_index(index: Path) -> dict[str, str]:
    """Returns the file name of each key, or raises an ArtifactError; names stay in the folder."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise ArtifactError(
            "the index has no weight_map from keys to files",
            where=str(index),
            next_step="fetch the file again",
        )
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard in ("", ".."):
            raise ArtifactError(
                f"the index points outside of the directory: {shard!r}",
                where=str(index),
                next_step="fetch the checkpoint again, from somebody you trust",
            )
    return shard_of


def _read_headers(directory: Path) -> dict[str, OnDisk]:
    """Returns where every tensor of the checkpoint is; reads headers, closes every file."""
    if (directory / SINGLE).exists():
        return dict(_read_header(directory / SINGLE))
    index = directory / INDEX
    refuse_pickles(directory)
    shard_of = read_index(index)
    stored: dict[str, OnDisk] = {}
    for shard in sorted(set(shard_of.values())):
        stored.update(
            (key, tensor)
            for key, tensor in _read_header(directory / shard)
            if shard_of.get(key) == shard
        )
    if lost := sorted(set(shard_of) - set(stored)):
        raise ArtifactError(
            f"{len(lost)} tensors are not in the file that the index names, the first is {lost[0]}",
            where=str(directory / shard_of[lost[0]]),
            next_step="fetch the shards again; they belong to another index",
        )
    return stored


def _read_header(path: Path) -> Iterator[tuple[str, OnDisk]]:
    try:
        with safe_open(path, framework="pt", backend="pread") as shard:
            header = [(key, shard.get_slice(key)) for key in shard.keys()]  # noqa: SIM118
            described = [(key, s.get_shape(), s.get_dtype()) for key, s in header]
    # safetensors raises its own SafetensorError, or OSError.
    except Exception as error:
        raise ArtifactError(
            f"cannot read {path.name}: {error}",
            where=str(path),
            next_step="the file is missing or truncated; fetch it again",
        ) from error
    for key, shape, dtype in described:
        if dtype not in _DTYPES:
            raise ArtifactError(
                f"tensor {key!r} is stored as {dtype}, a quantized format",
                where=str(path),
                next_step="start from the checkpoint before quantization, and quantize last",
            )
        yield key, OnDisk(path, key, torch.Size(shape), _DTYPES[dtype])


def _skeleton(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    fake_mode: FakeTensorMode,
) -> PreTrainedModel:
    """Builds the model with fake parameters and real buffers."""
    build: Any = model_class._from_config
    with _fake_parameters(fake_mode):
        model: PreTrainedModel = build(config, dtype=dtype)
        if plan := model._get_dtype_plan(dtype):
            # transformers keeps these in another precision than the rest, whatever the file says.
            kept, glob_of_group, _ = build_glob_alternation(list(plan))
            for name, parameter in list(model.named_parameters()):
                if match := kept.search(name):
                    owner, _, leaf = name.rpartition(".")
                    wanted = plan[glob_of_group[str(match.lastgroup)]]
                    setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.to(wanted)))
    if computed := [name for name, b in model.named_buffers() if isinstance(b, FakeTensor)]:
        raise ValueError(f"the buffer {computed[0]} is computed from them")
    model.train(False)
    return model


@contextmanager
def _fake_parameters(fake_mode: FakeTensorMode) -> Iterator[None]:
    """While it lasts, every parameter that a module registers becomes a fake tensor."""

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        # Tied parameters are registered again as they are: they stay one object.
        if isinstance(parameter, FakeTensor) and not parameter.requires_grad:
            return None
        with fake_mode:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            fake: Any = nn.Parameter(empty, requires_grad=False)
        # transformers' own mark for what needs no initialisation; buffers still get theirs.
        fake._is_hf_initialized = True
        return fake

    handle = register_module_parameter_registration_hook(replace)
    try:
        with guard_torch_init_functions():
            yield
    finally:
        handle.remove()


def _fill_buffers(model: PreTrainedModel, sources: dict[str, Source], directory: Path) -> None:
    """Gives the buffers that belong to the state of the model their values from the checkpoint."""
    state = model.state_dict()
    buffers = {name: b for name, b in model.named_buffers() if name in state}
    lost = LoadStateDictInfo(buffers.keys() - sources.keys(), set(), set(), [], {}, set())
    # transformers knows which buffers an older checkpoint may lack.
    model._adjust_missing_and_unexpected_keys(lost)
    for name in sorted(lost.missing_keys):
        raise _missing(name, directory)
    for name in buffers.keys() & sources.keys():
        _check_shape(name, sources[name], buffers[name], directory)
        buffers[name].copy_(sources[name].load())


def _one_source(
    names: list[str], parameter: Tensor, sources: dict[str, Source], directory: Path
) -> Source:
    found = [name for name in names if name in sources]
    if not found:
        raise _missing(names[0], directory)
    first = sources[found[0]]
    for name in found:
        _check_shape(name, sources[name], parameter, directory)
    for name in found[1:]:
        # transformers unties them with a warning; then the model is not the one of the config.
        if not torch.equal(first.load(), sources[name].load()):
            raise ArtifactError(
                f"the config ties {found[0]} and {name}, but the checkpoint holds different values",
                where=str(directory / CONFIG),
                next_step='set "tie_word_embeddings": false, or remove one of the two tensors',
            )
    return first


def _check_shape(name: str, source: Source, expected: Tensor, directory: Path) -> None:
    if source.shape != expected.shape:
        path = getattr(source, "path", directory)
        raise ArtifactError(
            f"{name} has shape {list(source.shape)}, the model expects {list(expected.shape)}",
            where=str(path),
            next_step=f"check that {CONFIG} belongs to these weights",
        )


def _missing(name: str, directory: Path) -> ArtifactError:
    return ArtifactError(
        f"the checkpoint has no tensor for {name}",
        where=str(directory),
        next_step=f"set architectures in {CONFIG} to the class that the weights were saved from;"
        " if from_pretrained computes it instead (sinusoids), compile that live model",
    )
