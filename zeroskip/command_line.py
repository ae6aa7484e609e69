"""What all commands share: --quiet, --verbose, exit codes in the help, and how they end."""

from __future__ import annotations

import functools
import inspect
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, NoReturn

import typer

from zeroskip.exits import (
    EXIT_CODES,
    GATE_FAILED,
    REFUSED,
    STOPPED,
    GateError,
    Manner,
    fail,
    manner,
    speaking,
)
from zeroskip.ir.errors import CompileError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_FLAGS = {
    "quiet": typer.Option("--quiet", "-q", help="No progress, no notes: results and problems."),
    "verbose": typer.Option("--verbose", "-v", help="Each step; the traceback behind a problem."),
}


def with_manners(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command --quiet and --verbose, unless it has them, and the exit codes."""
    signature = inspect.signature(function, eval_str=True)
    added = [name for name in _FLAGS if name not in signature.parameters]
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        )
        for name, option in _FLAGS.items()
        if name in added
    ]

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        how = replace(manner(), **{name: bool(given.get(name)) for name in _FLAGS})
        options = {name: value for name, value in given.items() if name not in added}
        with speaking(how):
            try:
                return function(*args, **options)
            except GateError as error:
                fail(error, GATE_FAILED, error.result)
            except CompileError as error:
                fail(error, STOPPED)
            except BrokenPipeError:
                raise  # Whoever read our output has seen enough.
            except (OSError, MemoryError) as error:
                fail(_named(error), STOPPED)

    parameters = [*signature.parameters.values(), *flags]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


class CommandLine(typer.Typer):
    """A group of commands that say how they end."""

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        """Registers a function as a command; see `typer.Typer.command`."""
        register = super().command(name, **{"epilog": EXIT_CODES, **options})
        return lambda function: register(with_manners(function))

    def run(self, arguments: Sequence[str]) -> NoReturn:
        """Runs a command line; always ends in SystemExit."""
        # Names of files may hold what no encoding has: they are shown, not stumbled over.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        with speaking(Manner(as_json="--json" in options)):
            if not manner().as_json:
                self(args=list(arguments))
                raise SystemExit(0)
            try:
                code = self(args=list(arguments), standalone_mode=False)
            except Exception as error:
                _fail_in_json(error)
            raise SystemExit(code if isinstance(code, int) else 0)


def _fail_in_json(error: Exception) -> NoReturn:
    """Ends with a document, where a person would be shown usage, or a traceback."""
    message = getattr(error, "format_message", None)
    if message is not None:  # Of the command line: an unknown option, a missing argument.
        fail(UsageError(message(), next_step="see --help"), REFUSED)
    traceback.print_exc(file=sys.stderr)
    problem = f"{type(error).__name__}: {error}"
    fail(UnexpectedError(problem, next_step="report it, with the traceback"), STOPPED)


class UsageError(CompileError):
    """The command line cannot be understood."""


class UnexpectedError(CompileError):
    """A defect of zeroskip, or of something below it."""


class SystemRefusedError(CompileError):
    """The system refused a file, or memory."""


def _named(error: OSError | MemoryError) -> SystemRefusedError:
    if isinstance(error, MemoryError):
        problem = SystemRefusedError(
            "there is not enough memory", next_step="give a lower --memory"
        )
    else:
        where = None if error.filename is None else str(error.filename)
        step = "free space or permissions there and try again"
        problem = SystemRefusedError(error.strerror or str(error), where=where, next_step=step)
    problem.__cause__ = error
    return problem
