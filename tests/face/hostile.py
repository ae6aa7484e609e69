"""What hostile tests share: a command may refuse, and may do nothing else."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.face.artefacts import run

CANARY = "EXECUTED"


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Checks that nothing below a folder is written, made or removed."""
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    assert after == before


def refused(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path
) -> tuple[int, str]:
    """Runs a command that has to refuse and leave everything below `folder` as it is."""
    with nothing_changes(folder):
        code, _, err = run(capsys, *arguments)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert code in (1, 2, 4), (arguments, code, err)
    assert said, (arguments, err)
    assert "Traceback" not in err, (arguments, err)
    assert not list(folder.rglob(CANARY)), arguments
    return code, err


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that format, whatever is in it; `length` is a lie about the header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
