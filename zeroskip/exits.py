"""How a command ends: exit codes, a problem on standard error, and with --json on standard output."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import typer

from zeroskip.ir.errors import CompileError

DONE = 0
STOPPED = 1
REFUSED = 2
GATE_FAILED = 3
CHANGED = 4
EXIT_CODES = (
    "Exit codes: 0 done; 1 a computation stopped; 2 the command line or an input cannot be used, "
    "nothing was computed; 3 a gate failed, the result is kept aside; 4 verify found an artefact "
    "that is not what it was."
)


@dataclass(frozen=True)
class Manner:
    """How a command speaks.

    Args:
        as_json: Standard output holds one JSON document and nothing else.
        quiet: No progress and no notes.
        verbose: Every step as it begins and ends, and the traceback behind a problem.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def shows_progress(self) -> bool:
        """Whether somebody is there to look at a progress bar, and wants one."""
        return not (self.as_json or self.quiet) and sys.stderr.isatty()


_PLAIN = Manner()
_MANNER: ContextVar[Manner] = ContextVar("manner", default=_PLAIN)


def manner() -> Manner:
    """Returns how the command at work is to speak."""
    return _MANNER.get()


@contextmanager
def speaking(how: Manner) -> Iterator[None]:
    """Lets commands speak in a manner, within."""
    token = _MANNER.set(how)
    try:
        yield
    finally:
        _MANNER.reset(token)


class GateError(CompileError):
    """A result is not what a gate demands; it is kept aside.

    Args:
        problem: Which gates failed, by how much, and what cost most.
        where: The folder that the result is in.
        result: What there is to say about it, for --json.
    """

    def __init__(self, problem: str, where: str, result: Mapping[str, Any]) -> None:
        super().__init__(
            problem,
            where=where,
            next_step="prune less, leave what costs most dense (`ignore`), or move the limit",
        )
        self.result = result


@contextmanager
def refusing_inputs() -> Iterator[None]:
    """Ends the program with the exit code for unusable inputs."""
    try:
        yield
    except CompileError as error:
        fail(error, REFUSED)


def fail(error: CompileError, code: int, result: Mapping[str, Any] | None = None) -> NoReturn:
    """Says what is wrong and ends the program.

    Args:
        error: Goes to standard error, and with --json to standard output as well.
        code: The exit code.
        result: What there is to say in spite of it; with --json it is part of the same document.
    """
    if manner().verbose:
        traceback.print_exception(error)
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(str(error), err=True)
    if manner().as_json:
        document = {**(result or {}), "error": as_data(error), "exit_code": code}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    raise SystemExit(code) from None


def as_data(error: CompileError) -> dict[str, str | None]:
    """Returns a problem as plain values for JSON."""
    return {
        "kind": type(error).__name__,
        "problem": error.problem,
        "where": error.where,
        "pass": error.pass_name,
        "next_step": error.next_step,
    }
