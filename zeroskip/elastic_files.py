"""The files of an elastic artefact: their sizes and digests, taken and compared."""

from __future__ import annotations

from pathlib import Path

from zeroskip.elastic_manifest import (
    CHECKPOINT,
    MANIFEST_FILE,
    TENSORS_FILE,
    Manifest,
    refuse,
)
from zeroskip.manifest_files import FileEntry, describe_file, files_of, is_linked


def hash_files(directory: Path) -> dict[str, FileEntry]:
    """Returns size and digest of the tensors and of every file of the checkpoint."""
    found = [directory / TENSORS_FILE, *files_of(directory / CHECKPOINT)]
    return {path.relative_to(directory).as_posix(): describe_file(path) for path in found}


def verify_files(manifest: Manifest, directory: Path) -> None:
    """Reads every file and compares it with the manifest.

    Raises:
        ArtifactError: One is missing, truncated, changed, a link, or was added to the checkpoint.
    """
    for name, entry in manifest.files.items():
        path = directory / name
        if is_linked(directory, name):
            refuse(path, f"{name} is a link, and an artefact holds its files itself")
        if not path.is_file():
            refuse(path, f"{name} is missing")
        try:
            size = path.stat().st_size
            if size < entry.bytes:
                refuse(path, f"{name} is truncated: {size} of {entry.bytes} bytes are there")
            if size > entry.bytes or describe_file(path) != entry:
                refuse(path, f"{name} was tampered with: it is not what {MANIFEST_FILE} says")
        except OSError as error:
            refuse(path, f"{name} cannot be read: {error}")
    for path in files_of(directory / CHECKPOINT):
        if path.relative_to(directory).as_posix() not in manifest.files:
            refuse(path, f"{path.name} was added: {MANIFEST_FILE} does not name it")
