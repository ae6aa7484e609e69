"""Models on disk: a Hugging Face directory or a GGUF file becomes a model and its tokenizer.

Nothing is ever downloaded: a path that is not there is an error, never the name of a repository.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroskip.ir.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode, and its tokenizer.

    Args:
        path: A directory as `save_pretrained` writes it, a GGUF file, or a directory with one.
        dtype: The dtype of the weights; those of a GGUF file are dequantised into it.

    Raises:
        ArtifactError: Nothing there, or not loadable; says what is missing.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    model = _load_gguf(gguf, dtype) if gguf else _load_directory(path, dtype)
    model.train(False)
    return model, load_tokenizer(path)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face directory or of a GGUF file.

    Raises:
        ArtifactError: Nothing there, or not loadable; says what is missing.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    gguf = _gguf_file(path)
    try:
        if gguf:
            return AutoTokenizer.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                local_files_only=True,
                trust_remote_code=False,
            )
        # Without a word about it, transformers asks on the terminal whether code is to run.
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Readers of damaged files raise struct.error, KeyError and others; the tokenizers library knows
    # only Exception itself.
    except Exception as error:
        _check_configuration(path, gguf)
        raise ArtifactError(
            f"The tokenizer cannot be loaded: {error}",
            where=str(path),
            next_step="Save it there with `tokenizer.save_pretrained(directory)`.",
        ) from error


def _check_configuration(path: Path, gguf: Path | None) -> None:
    """Raises ArtifactError where it is the model itself that cannot be read, not its tokenizer."""
    from transformers import AutoConfig

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        if gguf:
            AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, **safe)
        else:
            AutoConfig.from_pretrained(path, **safe)
    except Exception as error:  # See `load_tokenizer`.
        named = "GGUF file" if gguf else "config.json"
        raise ArtifactError(
            f"The {named} cannot be read: {error}",
            where=str(gguf or path),
            next_step=f"Check that the {named} is complete, and that transformers supports it.",
        ) from error


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` stands for, or None for a Hugging Face directory."""
    if not path.exists():
        raise ArtifactError(
            "There is no model here.",
            where=str(path),
            next_step="Give a local Hugging Face directory or a GGUF file; nothing is downloaded.",
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ArtifactError(
                "A model is a directory or a .gguf file, and this is neither.", where=str(path)
            )
        return _with_reader(path)
    if (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ArtifactError(
            f"The directory has no config.json and {len(files)} GGUF files.",
            where=str(path),
            next_step=_next_to(path),
        )
    return _with_reader(files[0])


def _next_to(path: Path) -> str:
    """What to give instead of a folder that is no model: what lies in it, if it is an artefact."""
    inside = [name for name in ("checkpoint", "onnx") if (path / name).is_dir()]
    if inside:
        return f"Give {' or '.join(str(path / name) for name in inside)}, which lie in it."
    if (path / "model.onnx").is_file():
        return "Give the checkpoint that the ONNX folder was made from; its tokenizer is not here."
    return "Give a directory that `save_pretrained` wrote, or name one GGUF file."


def _with_reader(path: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise ArtifactError(
            "A GGUF file needs the `gguf` package, which is not installed.",
            where=str(path),
            next_step="pip install 'zeroskip[gguf]'",
        )
    return path


def _load_directory(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the class that config.json names, so that encoders load as well as language models."""
    import transformers

    from zeroskip.ir.checkpoint import INDEX, SINGLE, check_layers, read_index, refuse_pickles

    refuse_pickles(path)
    if not (path / SINGLE).exists():
        read_index(path / INDEX)
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **safe)
        check_layers(config, path)
        classes = [getattr(transformers, str(name), None) for name in config.architectures or []]
        known = (c for c in classes if isinstance(c, type) and hasattr(c, "from_pretrained"))
        loader: Any = next(known, transformers.AutoModelForCausalLM)
        model: PreTrainedModel = loader.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **safe
        )
        return model
    except ArtifactError:
        raise
    # Whatever a file that is cut short makes transformers and safetensors raise (safetensors has an
    # exception of its own, a direct child of Exception) is one problem here: not a checkpoint.
    except Exception as error:
        raise ArtifactError(
            f"The checkpoint cannot be loaded: {error}",
            where=str(path),
            next_step="Check that config.json and all safetensors files are complete.",
        ) from error


def _load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantises a GGUF file into an ordinary model, one that `save_pretrained` can write.

    `from_pretrained(gguf_file=...)` would leave a model that counts as quantised and refuses to be
    saved, and wants accelerate. The configuration and the tensors are read one after the other
    instead, so that nothing of the file's format is left on the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from zeroskip.ir.checkpoint import check_layers

    try:
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        check_layers(config, path)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )
        tensors = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
            str(path), return_tensors=True, model_to_load=model, torch_dtype=dtype
        )["tensors"]
        found = model.load_state_dict(tensors, strict=False)
    # A damaged file makes the reader of GGUF, transformers and torch raise whatever its bytes lead
    # to: struct.error, OverflowError, ValueError, a validation error derived from Exception alone.
    except Exception as error:
        raise ArtifactError(
            f"The GGUF file cannot be loaded: {error}",
            where=str(path),
            next_step="Check that it is complete, and that transformers supports its architecture.",
        ) from error
    model.tie_weights()
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    if missing or found.unexpected_keys:
        raise ArtifactError(
            f"The GGUF file lacks {sorted(missing)[:3]} and has {found.unexpected_keys[:3]} besides.",
            where=str(path),
            next_step="Check that transformers supports this architecture as GGUF.",
        )
    return model


def open_source(path: Path) -> torch.nn.Module | Path:
    """A directory is compiled from disk; a GGUF file has to be dequantised first."""
    if (path / "config.json").is_file():
        return path
    return load_model(path)[0]
