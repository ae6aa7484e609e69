"""What an artefact was made from: every file that was read, by its name as given, and its digest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from zeroskip.ir.checkpoint import INDEX, SINGLE, read_index
from zeroskip.ir.checkpoint_writer import COMPANIONS
from zeroskip.ir.errors import ArtifactError
from zeroskip.manifest_files import describe_file

if TYPE_CHECKING:
    from zeroskip.recipe import Recipe

_IN_HUB_CACHE = re.compile(r"/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<rest>.+)$")
Role = Literal["model", "calibration", "recipe", "tokenizer", "gate"]


class InputFile(NamedTuple):
    """A file that was read.

    Attributes:
        role: What it was read as.
        name: As it was given; relative to the working directory where it lies below that.
    """

    role: Role
    name: str
    bytes: int
    sha256: str


def read_inputs(role: Role, path: Path) -> list[InputFile]:
    """Hashes a file, or the files of a model's folder that make a difference to what is compiled.

    Raises:
        ArtifactError: One cannot be read.
    """
    try:
        return [
            InputFile(role, name_of(file), *_entry(file))
            for file in (_model_files(path) if path.is_dir() else [path])
        ]
    except OSError as error:
        raise ArtifactError(
            f"an input cannot be read: {error}",
            where=str(path),
            next_step="check that it is there and that you may read it",
        ) from error


def inputs_of(model: Path, recipe: str, calibration: Path | None, plan: Recipe) -> list[InputFile]:
    """Hashes everything that a compilation reads.

    Args:
        model: A folder or a GGUF file.
        recipe: A file, or the name of a preset, which is no file.
        calibration: Takes the place of the recipe's own text.
        plan: The recipe, read.

    Raises:
        ArtifactError: Something cannot be read.
    """
    gate = plan.gates.max_perplexity_increase
    read: list[tuple[Role, Path | str | None]] = [
        ("model", model),
        ("recipe", recipe if Path(recipe).is_file() else None),
        ("calibration", calibration or plan.calibration.text),
        ("gate", gate.text if gate else None),
        *(("tokenizer", getattr(step, "tokenizer", None)) for step in plan.passes),
    ]
    return [
        found for role, path in read if path is not None for found in read_inputs(role, Path(path))
    ]


def way_back(out: Path) -> str | None:
    """Returns the working directory as seen from a folder below it; None where it is not below."""
    here, there = Path.cwd(), Path(os.path.abspath(out))
    return Path(os.path.relpath(here, there)).as_posix() if there.is_relative_to(here) else None


def name_of(path: Path) -> str:
    """Returns a path as the manifest names it: relative where it lies below the working directory.

    A file of the hub's cache is named after its model and revision: where the cache is says nothing.
    """
    if found := _IN_HUB_CACHE.search(path.as_posix()):
        return f"{found['owner']}/{found['name']}@{found['rest']}"
    here, absolute = Path.cwd(), Path(os.path.abspath(path))
    shown = absolute.relative_to(here) if absolute.is_relative_to(here) else path
    return shown.as_posix()


def _entry(path: Path) -> tuple[int, str]:
    entry = describe_file(path)
    return entry.bytes, entry.sha256


def _model_files(directory: Path) -> Iterator[Path]:
    """The weights that a checkpoint is read from, and all that is copied or read beside them."""
    read = {SINGLE}
    if not (directory / SINGLE).is_file() and (directory / INDEX).is_file():
        read = {INDEX, *read_index(directory / INDEX).values()}
    for path in sorted(directory.iterdir()):
        beside = path.suffix in {*COMPANIONS, ".gguf"} and path.name != INDEX
        if path.is_file() and (beside or path.name in read):
            yield path
        elif path.is_dir() and path.name == "additional_chat_templates":
            yield from sorted(file for file in path.rglob("*") if file.is_file())
