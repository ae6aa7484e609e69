"""A progress bar over the passes and stages of a compilation; and none of transformers'."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zeroskip.exits import manner
from zeroskip.ir.program import Program
from zeroskip.passes import Instrument, Pass, PassResult


class ProgressBar(Instrument):
    """Shows the pass and stage at work and the time left, on standard error."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("compiling")

    def begin(self, steps: int) -> None:
        self._progress.update(self._task, total=steps)
        self._progress.start()

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        self._progress.update(self._task, description=f"{step.name} ({part})")

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        self._progress.advance(self._task)

    def resumed(self, steps: Sequence[Pass], part: str) -> None:
        self._progress.advance(self._task, len(steps))

    def end(self) -> None:
        task = self._progress.tasks[self._task]
        # Stages behind the last one with work are skipped: the bar ends full all the same.
        self._progress.update(self._task, completed=task.total, description="compiled")
        self._progress.stop()


class StepLog(Instrument):
    """Says of every pass and stage that it is done, in a line on standard error: for a log file."""

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        changed = "" if result.modified else ", changed nothing"
        typer.echo(f"{part}: {step.name}, {result.seconds:.2f} s{changed}", err=True)


@contextmanager
def without_loading_bars(hidden: bool = True) -> Iterator[None]:
    """Hides the progress bars with which transformers loads models, within.

    They stay where `hidden` is False and the command is not to be quiet.
    """
    if not (hidden or manner().quiet):
        yield
        return
    from transformers.utils import logging

    def hide(make: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        return make(*args, **{**options, "disable": True})

    # The loader of GGUF files has a bar that transformers' own setting does not reach.
    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    own = gguf.tqdm
    gguf.tqdm = partial(own, disable=True)
    before = logging.set_tqdm_hook(hide)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
        gguf.tqdm = own
