"""The reference of the command line, from the typer application."""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer

from zeroskip.cli import app
from zeroskip.exits import EXIT_CODES


def commands() -> dict[str, Any]:
    """Every command by what is typed for it: `compile`, and `recipe show` for those in a group."""
    return dict(_commands("", typer.main.get_command(app)))


def command_page() -> str:
    """The page as Markdown."""
    parts = [
        "# Command line",
        (
            "Made from the commands themselves: `zeroskip COMMAND --help` says the same. Results go to "
            "standard output, problems to standard error: what is wrong, where, and the next step."
        ),
        EXIT_CODES,
    ]
    for name, command in commands().items():
        context = typer.Context(command, info_name=f"zeroskip {name}")
        parts += [f"## zeroskip {name}", _prose(command.help or "")]
        parts.append(f"```text\n{_unstyled(command.get_usage(context))}\n```")
        rows = [record for p in command.params if (record := p.get_help_record(context))]
        if rows:
            lines = [f"| `{_cell(left)}` | {_prose(_cell(right))} |" for left, right in rows]
            parts.append("\n".join(["| | what it is |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _commands(prefix: str, group: Any) -> list[tuple[str, Any]]:
    found = []
    for name, command in group.commands.items():
        typed = f"{prefix} {name}".strip()
        found += _commands(typed, command) if hasattr(command, "commands") else [(typed, command)]
    return found


def _prose(text: str) -> str:
    return inspect.cleandoc(text).replace("<", "&lt;")


def _unstyled(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _cell(text: str | None) -> str:
    return " ".join(_unstyled(text or "").split()).replace("|", "\\|")
