"""What was measured on this machine, kept in a file between processes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeroskip.runtime.kernels.location import cache_folder

FORMAT = 1
_LOG = logging.getLogger("zeroskip")


def tuning_file() -> Path:
    """Returns where measurements are kept; ZEROSKIP_CACHE moves it. It may be deleted any time."""
    return cache_folder().parent / "tuning.json"


class TuningCache:
    """A file of measurements: a text that names the circumstances to what was seen.

    A file that cannot be read counts as empty, one that cannot be written is a warning: nothing is
    lost but the time to measure again. Two processes that write at once leave a whole file; it may
    lack what one of them added in that moment.

    Args:
        path: The file; by default the one of this user.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = tuning_file() if path is None else path
        self._cells: dict[str, dict[str, Any]] | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns what was seen under these circumstances, or None."""
        if self._cells is None:
            self._cells = self._read()
        return self._cells.get(key)

    def put(self, cells: Mapping[str, dict[str, Any]]) -> None:
        """Adds measurements to the file, beside what other processes put there."""
        self._cells = {**self._read(), **cells}
        text = json.dumps({"format": FORMAT, "cells": self._cells}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text + "\n")
        except OSError as error:
            _LOG.warning("the measurements cannot be kept in %s: %s", self.path, error)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                return {}  # An older zeroskip wrote it: not worth a warning.
            return {key: cell for key, cell in stored["cells"].items() if _is_cell(cell)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("%s cannot be read and is written anew: %s", self.path, error)
            return {}


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that others see the old one or the new one, whole.

    Raises:
        OSError: The folder cannot be written; the old file is as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private.
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict):
        return False
    numbers = (cell.get(name) for name in ("dense_seconds", "sparse_seconds", "noise"))
    return all(isinstance(number, float) and number >= 0 for number in numbers) and (
        cell["dense_seconds"] > 0 and cell["sparse_seconds"] > 0
    )
