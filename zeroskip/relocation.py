"""Paths of a build while it is still under another name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.ir.errors import RecipeError

if TYPE_CHECKING:
    from zeroskip.passes.base import Pass


def under(step: Pass, folder: Path) -> Pass:
    """Returns a pass that writes a `directory` with that directory taken as relative to `folder`.

    Raises:
        RecipeError: The directory leads out of the folder.
    """
    directory = getattr(step, "directory", None)
    if directory is None:
        return step
    check_inside(step)
    moved = {"directory": folder / directory}
    return replace(step, **moved)


def check_inside(step: Pass) -> None:
    """Refuses a pass whose `directory` leads out of the folder that is compiled into.

    Raises:
        RecipeError: It is absolute, or goes up, or is that folder itself.
    """
    directory = getattr(step, "directory", "here")
    path = Path(directory)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(directory):
        raise RecipeError(
            f"the directory {str(directory)!r} leads out of the folder that is compiled into",
            pass_name=step.name,
            next_step="write a relative one, such as `onnx`; it lies below --out",
        )


def relocated(value: Any, partial: Path, out: Path) -> Any:
    """Returns plain data with every mention of the partial folder changed to the final one."""
    if isinstance(value, dict):
        return {key: relocated(item, partial, out) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [relocated(item, partial, out) for item in value]
    if isinstance(value, Path):
        value = str(value)
    return value.replace(str(partial), str(out)) if isinstance(value, str) else value
