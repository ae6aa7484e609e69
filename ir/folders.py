"""Folders that models come from and go to.

A new one appears complete or not at all: everything is written beside it, waits until the disk has
it, and is renamed. Whatever ends the machine, a name never stands for half of a folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from zeroskip.ir.errors import ArtifactError


def source_folder(model: object) -> Path | None:
    """Returns the folder that a Hugging Face model was loaded from; None where it was none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def check_target(target: Path) -> None:
    """Checks that a folder could be written, before the work that fills it.

    Raises:
        ArtifactError: The target holds something, or the folder above it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(
            "the target already holds something",
            where=str(target),
            next_step="remove it, or choose another folder; nothing is overwritten",
        )
    above = target.absolute()
    while not above.exists():
        if above.is_symlink():  # To write there would make whatever it points to.
            raise ArtifactError(
                f"{above} is a link that leads nowhere",
                where=str(target),
                next_step="remove the link, or choose another folder",
            )
        above = above.parent
    above = target.absolute().parent if above == target.absolute() else above
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"the folder cannot be written: {above} is no folder that you may write to",
            where=str(target),
            next_step="choose another folder",
        )


@contextlib.contextmanager
def new_folder(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends, and vanishes if it raises.

    Args:
        target: Must not exist, or be an empty folder. Missing parents are created.
        partial: What it is called until then, on the same file system; what is there is removed. By
            default a new name beside the target.

    Raises:
        ArtifactError: The target holds something, or it cannot be written.
    """
    target = target.absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if partial is None:
            # A sibling, so that the rename stays within one file system.
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
    except OSError as error:
        raise ArtifactError(
            f"the folder cannot be written: {error}",
            where=str(target.parent),
            next_step="choose a folder that you may write to",
        ) from error
    try:
        yield partial
        _settle(partial)
        partial.replace(target)  # Replaces an empty folder, refuses one that was filled since.
        sync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk answers.
        raise ArtifactError(
            f"the folder cannot be completed: {error}",
            where=str(target),
            next_step="free space or permissions there and try again; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_umask(path: Path, mode: int) -> None:
    """Gives what `tempfile` made, which is private, the mode that the user's umask leaves of one."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk and not only on their way."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to wait for.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Gives all that lies in a folder, and itself, the modes of new files, and waits for the disk.

    safetensors and `tempfile` make files that only their owner may read.
    """
    for above, _, names in os.walk(folder, topdown=False):
        for file in (Path(above, name) for name in names):
            if not file.is_symlink():
                open_to_umask(file, 0o666)
                sync(file)
        open_to_umask(Path(above), 0o777)
        sync(Path(above))


def aside_of(target: Path) -> Path:
    """Returns where a result goes that is not to be `target`: `target.failed`, or `target.failed-2` ..."""
    target = target.absolute()
    place, number = target.with_name(f"{target.name}.failed"), 1
    while os.path.lexists(place):
        number += 1
        place = target.with_name(f"{target.name}.failed-{number}")
    return place


def set_aside(partial: Path, place: Path) -> None:
    """Renames a complete folder that `new_folder` made; nothing is overwritten.

    Raises:
        ArtifactError: The place is taken by now, or cannot be written.
    """
    try:
        _settle(partial)
        partial.rename(place)
        sync(place.parent)
    except OSError as error:
        raise ArtifactError(
            f"the folder cannot be kept: {error}",
            where=str(place),
            next_step="remove what is there and try again",
        ) from error
