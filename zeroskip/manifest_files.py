"""What every manifest needs: digests of files, hostile JSON read, names kept inside a folder.

A digest is no signature: it finds damage and careless edits, not somebody who computes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import open_to_umask

_LARGEST = 2**26


@dataclass(frozen=True)
class FileEntry:
    """The size and digest of a file."""

    bytes: int
    sha256: str


def describe_file(path: Path) -> FileEntry:
    """Reads a file once; returns its size and digest.

    Raises:
        OSError: It cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def describe_files(directory: Path, *, besides: str = "") -> dict[str, FileEntry]:
    """Returns size and digest of every file below a folder by its name there, but `besides`."""
    found = {path.relative_to(directory).as_posix(): path for path in files_of(directory)}
    return {name: describe_file(path) for name, path in found.items() if name != besides}


def files_of(directory: Path) -> list[Path]:
    """Returns every file and every link below a folder, sorted, but the hidden ones.

    Hidden files are those of file managers and version control; nothing reads them.
    """
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    below = ((path, path.relative_to(directory)) for path in found)
    return sorted(path for path, name in below if not any(p.startswith(".") for p in name.parts))


def is_inside(name: str) -> bool:
    """Returns whether a name with slashes stays below the folder that it is taken from."""
    plain = PurePosixPath(name).as_posix() == name and not {"", ".", ".."} & set(name.split("/"))
    return plain and not any(c in name for c in "\\:\0")


def is_linked(directory: Path, name: str) -> bool:
    """Returns whether a file, or a folder on the way to it, is a link."""
    return (directory / name).resolve() != directory.resolve() / name


def digest_of(content: Mapping[str, Any]) -> str:
    """Returns the digest of plain values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in the JSON file of a manifest.

    Raises:
        ValueError: It is no JSON object, or is too large; says why.
        OSError: It cannot be read.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError("it is larger than any manifest")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_no_constant,
            object_pairs_hook=_no_duplicates,
        )
    except RecursionError as error:
        raise ValueError(f"it is nested too deep: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def write_object(content: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file beside the old one, then puts it in its place.

    Raises:
        ArtifactError: It cannot be written; the old one is as it was.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Names of files that are no UTF-8 are kept as escapes.
    encoded = text.encode("utf-8", "backslashreplace")
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        open_to_umask(partial, 0o666)
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"{path.name} cannot be written: {error}",
            where=str(path.parent),
            next_step="free space or permissions there and try again",
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content
