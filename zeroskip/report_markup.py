"""HTML and SVG that cannot be broken into: whatever is not `Markup` already is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_VOID = frozenset({"meta", "br", "rect", "line", "path", "circle", "polyline"})


class Markup(str):
    """Text that is HTML already. Only `tag` and `join` make it."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Returns an element.

    Args:
        name: Of the element.
        children: Markup is taken as it is, anything else as text; None is left out.
        attributes: `_` becomes `-`, a `_` at the end goes (`class_`); None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{given}>" if name in ("meta", "br") else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Returns one piece of markup from many; text is escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child), quote=True)
            for child in children
            if child is not None
        )
    )


def prose(text: str) -> Markup:
    """Returns a text; what stands in it between backticks is code."""
    parts = text.split("`")
    return join(tag("code", part) if i % 2 else part for i, part in enumerate(parts))


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numeric: Sequence[int] = (),
    caption: str | None = None,
) -> Markup:
    """Returns a table that scrolls sideways where it does not fit.

    Args:
        head: The headings of its columns.
        rows: The cells of each line.
        numeric: Columns that are aligned to the right.
        caption: What a reader that does not see it is told.
    """
    right = set(numeric)

    def cells(name: str, line: Sequence[object], **more: str) -> Markup:
        return join(
            tag(name, cell, class_="n" if i in right else None, **more)
            for i, cell in enumerate(line)
        )

    return tag(
        "div",
        tag(
            "table",
            None if caption is None else tag("caption", caption),
            tag("thead", tag("tr", cells("th", head, scope="col"))),
            tag("tbody", *(tag("tr", cells("td", row)) for row in rows)),
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )


def folded(summary: object, *content: object) -> Markup:
    """Returns content that unfolds on a click, and in print."""
    return tag("details", tag("summary", summary), *content)
