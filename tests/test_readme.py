"""The Python in README.md runs: its blocks in order, as one program, in an empty folder.

A block that follows the HTML comment `<!-- not run: why -->` is only compiled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"(?P<skipped><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of Python, the line it begins at, and whether it runs."""

    line: int
    code: str
    runs: bool


def blocks_of(text: str) -> list[Block]:
    """Every ```python block of a page."""
    return [
        Block(
            text.count("\n", 0, found.start("code")) + 1,
            found["code"],
            found["skipped"] is None,
        )
        for found in BLOCK.finditer(text)
    ]


def test_the_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks_of(README.read_text(encoding="utf-8")):
        # Blank lines in front make a traceback show the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(README), "exec")
        if block.runs:
            exec(code, names)


def test_blocks_are_found_with_their_lines() -> None:
    page = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```python\ny\n```\n```bash\nls\n```\n"
    assert blocks_of(page) == [Block(3, "x = 1\n", True), Block(7, "y\n", False)]
