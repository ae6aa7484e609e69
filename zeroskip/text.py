"""Where a function takes a text: the text itself, or the file that holds it."""

from __future__ import annotations

from pathlib import Path

from zeroskip.ir.errors import CompileError

_LONGEST_PATH = 4096


def read_text(path_or_text: str | Path, error: type[CompileError]) -> str:
    """Returns a text: a `Path`, or a string that names an existing file, is read from disk.

    Args:
        path_or_text: A file (UTF-8), or the text.
        error: The class to raise, so that the caller's errors carry the caller's name.
    """
    path = _file(path_or_text)
    if path is None:
        text, where = str(path_or_text), "the given string"
    else:
        where = str(path)
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as problem:
            raise error(
                f"The text cannot be read: {problem.strerror}.",
                where=where,
                next_step="Give the path of a UTF-8 text file.",
            ) from problem
        except UnicodeDecodeError as problem:
            raise error(
                f"The text is not UTF-8: byte {problem.start} cannot be decoded.",
                where=where,
                next_step="Convert the file to UTF-8, for instance with iconv.",
            ) from problem
    if not text.strip():
        raise error("The text is empty.", where=where, next_step="Give one with words in it.")
    return text


def _file(path_or_text: str | Path) -> Path | None:
    if isinstance(path_or_text, Path):
        return path_or_text
    if len(path_or_text) > _LONGEST_PATH or "\n" in path_or_text or "\0" in path_or_text:
        return None
    path = Path(path_or_text)
    try:
        return path if path.is_file() else None
    except OSError:  # a component longer than the file system allows: not a path
        return None
