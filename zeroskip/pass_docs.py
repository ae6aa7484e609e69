"""What a pass says about itself: its docstring in parts, and a text for each of its options.

The documentation site and `zeroskip passes` read the same docstrings, so a page cannot be out of
date.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroskip.passes import Pass

_OPTION = re.compile(r"    (?P<name>\w+): (?P<text>.+)")
_REFUSES = re.compile(r"(It refuses|Refuses|Leaves alone)\b")


@dataclass(frozen=True)
class PassDoc:
    """The docstring of a pass in parts.

    Args:
        summary: Its first sentence.
        paragraphs: What follows, without the parts below.
        refusals: The paragraphs that say what it refuses or leaves alone.
        listings: Programs by their heading, such as `Before` and `After`.
        source: Where the method comes from; empty where it is ours or common.
    """

    summary: str
    paragraphs: tuple[str, ...]
    refusals: tuple[str, ...]
    listings: tuple[tuple[str, str], ...]
    source: str


def pass_doc(cls: type[Pass]) -> PassDoc:
    """Reads the docstring of a pass."""
    summary, *blocks = _paragraphs(inspect.getdoc(cls) or "")
    paragraphs, refusals, listings, source = [], [], [], ""
    heading = None
    for block in blocks:
        if heading:
            listings.append((heading, inspect.cleandoc("\n" + block)))
        elif block.startswith("Source: "):
            source = block.removeprefix("Source: ")
        elif _REFUSES.match(block):
            refusals.append(block)
        elif not block.endswith("::") and not block.startswith("Args:\n"):
            paragraphs.append(block)
        heading = block[:-2] if block.endswith("::") else None
    return PassDoc(summary, tuple(paragraphs), tuple(refusals), tuple(listings), source)


def option_docs(cls: type[Pass]) -> dict[str, str]:
    """What each option of a pass is, from its own docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for block in _paragraphs(inspect.cleandoc(base.__doc__ or "")):
            if block.startswith("Args:\n"):
                found |= _options(block)
    return found


def _paragraphs(text: str) -> list[str]:
    """A docstring cut at blank lines."""
    return [block for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]


def _options(block: str) -> dict[str, str]:
    """The options of an `Args:` section; lines that are indented further go on with the text."""
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines()[1:]:
        started = _OPTION.fullmatch(line)
        if started:
            name = started["name"]
            found[name] = started["text"]
        elif name:
            found[name] += " " + line.strip()
    return found
