"""The folder that `zeroskip compile` writes: complete, or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from zeroskip.ir.errors import ArtifactError

if TYPE_CHECKING:
    from zeroskip.passes.base import Pass


@contextmanager
def build_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        ArtifactError: `out` holds something already, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(
            "The output folder holds something already.",
            where=str(out),
            next_step="Choose another folder, or remove this one first.",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, so that the last step is a rename within one file system.
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise ArtifactError(
            f"The output folder cannot be written: {error.strerror}.", where=str(out)
        ) from error
    try:
        yield partial
        partial.replace(out)  # POSIX: replaces an empty folder, refuses one that was filled since
    except OSError as error:
        raise ArtifactError(
            f"The output folder could not be completed: {error}.", where=str(out)
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def under(step: Pass, folder: Path) -> Pass:
    """Returns the pass with its relative paths taken as relative to `folder`."""
    hints = get_type_hints(type(step))
    moved = {
        field.name: folder / getattr(step, field.name)
        for field in fields(step)
        if Path in (hints[field.name], *get_args(hints[field.name]))
        and getattr(step, field.name) is not None
    }
    return replace(step, **moved) if moved else step


def relocated(value: Any, partial: Path, out: Path) -> Any:
    """Returns plain data with every mention of the partial folder changed to the final one."""
    if isinstance(value, dict):
        return {key: relocated(item, partial, out) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [relocated(item, partial, out) for item in value]
    if isinstance(value, Path):
        value = str(value)
    return value.replace(str(partial), str(out)) if isinstance(value, str) else value
