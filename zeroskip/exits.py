"""How a command ends: exit codes, and a problem on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from zeroskip.ir.errors import CompileError

STOPPED = 1
REFUSED = 2
CHANGED = 4
EXIT_CODES = (
    "Exit codes: 0 done; 2 the command line or an input cannot be used, nothing was computed; "
    "1 the compilation or evaluation stopped."
)


@contextmanager
def refusing_inputs() -> Iterator[None]:
    """Ends the program with the exit code for unusable inputs."""
    try:
        yield
    except CompileError as error:
        fail(error, REFUSED)


def fail(error: CompileError, code: int) -> NoReturn:
    """Says what is wrong on standard error and ends the program."""
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(str(error), err=True)
    raise SystemExit(code) from None
