"""What the bytes of a compilation depend on, as digests that can be compared one by one."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroskip.ir.stage_files import digest_of
from zeroskip.manifest import versions
from zeroskip.manifest_inputs import InputFile, read_inputs
from zeroskip.recipe import Recipe, dump_recipe

if TYPE_CHECKING:
    from zeroskip.passes import Pass

_PACKAGES = ("zeroskip", "zeroskip.ir", "zeroskip.passes", "zeroskip.runtime")
_SOURCES = (".py", ".json", ".cpp", ".h")


def artefact_key(plan: Recipe, inputs: Sequence[InputFile]) -> dict[str, Any]:
    """Returns what an artefact was compiled from; equal keys mean equal files.

    Args:
        plan: Every option counts, comments do not.
        inputs: Every file that is read. Names of folders do not count.
    """
    roles = sorted({one.role for one in inputs} - {"recipe"})
    return {
        "recipe": digest_of(dump_recipe(plan, defaults=True)),
        **{role: files_digest([one for one in inputs if one.role == role]) for role in roles},
        "code": code_digest(),
        **versions(),
    }


def stage_key(read: str, passes: Sequence[Pass], settings: object) -> str:
    """Returns what finished stages are known by, besides the options of the passes that made them.

    Args:
        read: A digest of the model.
        passes: Those of other packages count with the file that they are written in.
        settings: Calibration data, and whatever else was chosen.
    """
    sources = sorted({_source(type(step)) for step in passes})
    return digest_of([read, sources, settings, code_digest(), versions(), machine()])


def model_digest(model: torch.nn.Module | Path) -> str:
    """Returns a digest of a module, or of the files of a checkpoint directory."""
    if isinstance(model, torch.nn.Module):
        return digest_of([sorted(model.state_dict().items()), str(model)])
    return files_digest(read_inputs("model", model))


def files_digest(files: Sequence[InputFile]) -> str:
    """Returns a digest of files by their names, whatever folder they are in."""
    return digest_of(sorted((Path(one.name).name, one.sha256) for one in files))


def machine() -> dict[str, Any]:
    """Returns what of this machine can change the last bits of a sum."""
    return {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


@functools.cache
def code_digest() -> str:
    """Returns a digest of zeroskip's own files, once: code that is loaded does not change."""
    found = []
    for name in _PACKAGES:
        module = sys.modules[name] if name in sys.modules else __import__(name, fromlist=["_"])
        root = Path(str(module.__file__)).parent
        files = [path for path in root.rglob("*") if path.suffix in _SOURCES]
        found += [(name, path.relative_to(root).as_posix(), _digest(path)) for path in files]
    return digest_of(sorted(found))


def _source(cls: type) -> str:
    if cls.__module__.startswith("zeroskip."):
        return cls.__module__
    try:
        return f"{cls.__module__} {_digest(Path(inspect.getfile(cls)))}"
    except (OSError, TypeError):  # Written at a prompt: nothing tells two of a name apart.
        return f"{cls.__module__} {id(cls)}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
