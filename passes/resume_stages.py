"""What a run of passes has finished: kept on disk, and taken from there by the next run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from zeroskip.ir import process_group
from zeroskip.ir.program import Program
from zeroskip.ir.stage_files import StageFiles
from zeroskip.passes.base import Pass, graph_text
from zeroskip.passes.record_passes import Instrument, PassNote, PassRecord


class Journal:
    """Follows a compilation from part to part; without files it keeps the records and nothing else.

    A part counts as finished when all passes of a run are done with it. It is known by all that it
    was computed from: the key of the files, every run before, the options of the passes, the graph.

    Args:
        files: Where finished parts are.
        passes: The whole list.
        records: One for each pass; what was read counts as what was run.
        instruments: Told of what need not run.
    """

    def __init__(
        self,
        files: StageFiles | None,
        passes: Sequence[Pass],
        records: Sequence[PassRecord],
        instruments: Sequence[Instrument],
    ) -> None:
        self.parts: Sequence[str] = ()
        self._files = files
        self._passes = passes
        self._records = records
        self._instruments = instruments
        self._numbers: list[int] = []
        self._run = 0
        self._identity = ""
        self._keeps = files is not None
        # Behind the last pass that runs stage by stage the first process is alone.
        blocks = [number for number, step in enumerate(passes) if step.scope == "block"]
        self._last_shared = max(blocks, default=-1)
        self._is_alone = False

    def enter(self, numbers: list[int], program: Program, parts: Sequence[str]) -> None:
        """Begins a run of passes, on parts of a program or on the whole as its only part.

        Args:
            numbers: Of the passes.
            program: The whole.
            parts: Their names.
        """
        self._is_alone = numbers[0] > self._last_shared
        self._run += 1
        self._numbers, self.parts = numbers, parts
        self._keeps = self._files is not None
        if self._files is not None:
            steps = [settings_of(self._passes[number]) for number in numbers]
            self._identity = self._files.identify(self._identity, steps, parts, graph_text(program))

    def count_finished(self) -> int:
        """Returns how many parts of this run are on disk, from the first on without a gap."""
        return self._told_by_first(self._count() if process_group.is_first() else 0)

    def _count(self) -> int:
        if self._files is None:
            return 0
        for part in range(len(self.parts)):
            if not self._files.holds((self._run, part), self._identity):
                return part
        return len(self.parts)

    def read(self, part: int, before: Program) -> Program:
        """Returns what the passes had made of a part."""
        assert self._files is not None
        finished = self._files.read((self._run, part), before)
        self.note([PassNote(**step) for step in finished.steps])
        for instrument in self._instruments:
            instrument.resumed([self._passes[n] for n in self._numbers], self.parts[part])
        return finished.program

    def write(
        self, part: int, before: Program, after: Program, notes: Sequence[PassNote]
    ) -> Program:
        """Keeps a part that is finished, and returns it as it will be read.

        What cannot be kept is returned as it is, and the rest of the run is not kept either.
        """
        self.note(notes)
        if self._files is None or not self._keeps:
            return after
        number, program = (self._run, part), after
        if process_group.is_first():
            steps = [dataclasses.asdict(note) for note in notes]
            finished = self._files.write(number, self._identity, before, after, steps)
            self._keeps = finished is not None
            program = after if finished is None else finished.program
        self._keeps = bool(self._told_by_first(int(self._keeps)))
        if self._keeps and not process_group.is_first():
            # What the first process wrote, so that all go on with the same bits.
            program = self._files.read(number, before).program
        return program

    def _told_by_first(self, number: int) -> int:
        if self._is_alone:
            return number
        return int(process_group.from_owner(torch.tensor([number]), 0))

    def note(self, notes: Sequence[PassNote]) -> None:
        """Puts down what the passes of this run did on a part."""
        for number, note in zip(self._numbers, notes, strict=True):
            self._records[number].add(note)


def settings_of(step: Pass) -> list[object]:
    """Returns what a pass computes: its class and its options, but for where it writes."""
    # A directory may be a temporary one, other in each run.
    options = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    options.pop("directory", None)
    return [type(step).__qualname__, options]
