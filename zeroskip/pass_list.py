"""The passes as data and as a table: names, options, defaults, and one line of documentation."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field
from typing import TYPE_CHECKING, Any

from zeroskip.passes import PASSES
from zeroskip.recipe_options import options_of, plain

if TYPE_CHECKING:
    from rich.table import Table


def describe_passes() -> list[dict[str, Any]]:
    """Returns one JSON-ready dict per pass, in the order of PASSES."""
    return [
        {
            "name": name,
            "summary": _first_sentence(inspect.getdoc(cls) or ""),
            "lossy": cls.lossy,
            "requires": [fact.__name__ for fact in cls.requires],
            "provides": [fact.__name__ for fact in cls.provides],
            "options": [_option(*option) for option in options_of(cls).values()],
        }
        for name, cls in PASSES.items()
    ]


def pass_table() -> Table:
    """Returns the same as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for heading in ("pass", "what it does", "requires", "options"):
        table.add_column(heading, no_wrap=heading == "pass")
    for each in describe_passes():
        options = "\n".join(
            f"{option['name']}: {option['type']}"
            + (" (required)" if option["required"] else f" = {option['default']!r}")
            for option in each["options"]
        )
        changes = "\n(changes the numbers)" if each["lossy"] else ""
        # Text, not strings: rich would take the brackets of a type for markup.
        summary, requires = Text(each["summary"] + changes), "\n".join(each["requires"])
        table.add_row(each["name"], summary, requires, Text(options))
    return table


def _first_sentence(documentation: str) -> str:
    paragraph = " ".join(documentation.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."


def _option(field: Field[Any], hint: Any) -> dict[str, Any]:
    required = field.default is MISSING and field.default_factory is MISSING
    default = None if required else field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    return {
        "name": field.name,
        "type": hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", ""),
        "required": required,
        "default": plain(default),
    }
