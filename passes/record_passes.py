"""What a pass did: watchers that are told while it happens, and records that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.passes.base import Pass, PassResult


class Instrument:
    """Watches a compilation; every method may be overridden, none has to be."""

    def begin(self, steps: int) -> None:
        """Called once a list of passes is known to be sound, with the number of steps to come."""

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        """Called before a pass runs on the program, or on one stage of it."""

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        """Called after a pass has run and its contract was proven."""

    def resumed(self, steps: Sequence[Pass], part: str) -> None:
        """Called where an earlier run had finished passes on a part, so that they do not run."""

    def end(self) -> None:
        """Called when the last pass is done, or one has failed."""


@dataclass(frozen=True)
class DumpPrograms(Instrument):
    """Writes the program before and after every pass as text files, numbered in order."""

    folder: Path

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        self._write(f"{step.name}-before", program, part)

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        self._write(f"{step.name}-after", result.program, part)

    def _write(self, label: str, program: Program, part: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("*.txt")))
        place = part.replace(" ", "-")
        (self.folder / f"{number:04d}-{place}-{label}.txt").write_text(print_program(program))


@dataclass(frozen=True)
class PassNote:
    """What one pass did on one part: a `PassResult` without the program."""

    seconds: float
    modified: bool
    drift: float | None

    @classmethod
    def of(cls, result: PassResult) -> PassNote:
        return cls(result.seconds, result.modified, result.drift)


@dataclass
class PassRecord:
    """What one pass of the list did, over all stages.

    Args:
        name: The pass.
        options: Its fields.
        stages: On how many parts of the program it ran.
        seconds: Time in the pass itself.
        modified: Whether it changed anything.
        drift: Largest drift over the parts; None when no number changed.
    """

    name: str
    options: dict[str, Any]
    stages: int = 0
    seconds: float = 0.0
    modified: bool = False
    drift: float | None = None

    def add(self, note: PassNote) -> None:
        """Adds what it did on one part."""
        self.stages += 1
        self.seconds += note.seconds
        self.modified |= note.modified
        if note.drift is not None:
            self.drift = max(self.drift or 0.0, note.drift)
