"""Commands that change an artefact, and its manifest with it: `tune` and `curve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zeroskip.manifest import MANIFEST_FILE, ManifestError, read_manifest, sign
from zeroskip.manifest_files import FileEntry, describe_file, files_of, read_object


@contextmanager
def recording(folder: Path, command: str, only: str | None = None) -> Iterator[None]:
    """Lets a command change files of an artefact, and records them anew when it succeeded.

    Where a file was not what the manifest said before, nothing is recorded: damage stays damage.

    Args:
        folder: The artefact, or a folder right below it; elsewhere nothing is recorded.
        command: What changes files in it.
        only: The one file that it changes; by default all may be another.

    Raises:
        ArtifactError: The manifest cannot be written.
    """
    artefact = next((p for p in (folder, folder.parent) if (p / MANIFEST_FILE).is_file()), None)
    if artefact is None or not _is_whole(artefact, folder, only):
        yield
        return
    yield
    content = read_object(artefact / MANIFEST_FILE)
    found = _names(artefact, folder, only)
    for name in [n for n in content["files"] if (artefact / n).is_relative_to(folder)]:
        if only is None and name not in found:
            del content["files"][name]
    for name, path in found.items():
        entry = describe_file(path)
        content["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    content["files"] = dict(sorted(content["files"].items()))
    content["changed_by"] = [*content["changed_by"], command]
    sign(content, artefact)


def _is_whole(artefact: Path, folder: Path, only: str | None) -> bool:
    try:
        files = read_manifest(artefact).files
        return all(
            name in files
            and describe_file(path) == FileEntry(files[name].bytes, files[name].sha256)
            for name, path in _names(artefact, folder, only).items()
        )
    except (ManifestError, OSError):
        return False


def _names(artefact: Path, folder: Path, only: str | None) -> dict[str, Path]:
    """The files in question by their names below the artefact."""
    paths = files_of(folder) if only is None else [folder / only]
    return {path.relative_to(artefact).as_posix(): path for path in paths}
