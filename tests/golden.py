"""Golden files: text that a test expects, kept beside the tests and rewritten on demand."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def golden_path(test_id: str, root: Path = GOLDENS) -> Path:
    """Returns the file that belongs to a test: `ir/test_printer/test_mlp.txt`."""
    file, _, name = test_id.partition("::")
    folder = file.removeprefix("tests/").removesuffix(".py")
    return root / folder / (re.sub(r"[^\w.-]+", "-", name).strip("-") + ".txt")


def check_golden(path: Path, text: str, update: bool) -> None:
    """Compares a text with a golden file, or writes the file.

    Raises:
        AssertionError: There is no such file, or it holds something else.
    """
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.exists():
        raise AssertionError(
            f"there is no golden {path}; look at the text, then run this test with --update-goldens"
        )
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "now", lineterm=""
        )
        raise AssertionError(
            f"the text differs from {path} (--update-goldens accepts it):\n" + "\n".join(lines)
        )
