"""Models by their name on the Hugging Face hub: `owner/name`, or `owner/name@revision`."""

from __future__ import annotations

import re
from pathlib import Path

from zeroskip.ir.errors import ArtifactError

_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# What a model is made of here. Weights in other formats, which may hold code, are never fetched.
FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")


def local_model(model: str | Path) -> Path:
    """Returns the folder of a model: the path itself, or that of a hub model in the local cache.

    A path that exists comes first. What the cache does not hold is downloaded into it, unless
    HF_HUB_OFFLINE is set.

    Args:
        model: A path, or `owner/name`, with `@revision` to always get the same one.

    Raises:
        ArtifactError: It looks like a hub model, and it is neither in the cache nor to be had.
    """
    found = _NAME.fullmatch(str(model))
    path = Path(model)
    if found is None or path.exists() or path.parent.is_dir():
        return path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            found["id"], revision=found["revision"], allow_patterns=list(FILES)
        )
        return Path(folder)
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise ArtifactError(
            f"{model} is no local path, and as a model of the Hugging Face hub it is neither in the "
            f"local cache nor can it be downloaded: {_first_line(error)}",
            where=str(model),
            next_step="check the path or the name; without a network, copy the model's folder here, "
            "or fill the cache elsewhere with `hf download` and set HF_HOME",
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
