"""PassManager: runs a list of passes in the order given, and says what each one did."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.memory import return_freed_memory
from zeroskip.ir.partition import Stage, find_stages
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.stages import Restricted, extract_stage, merge_facts, stitch_stages
from zeroskip.ir.streams import Stream, parse_bytes
from zeroskip.ir.verify import verify
from zeroskip.passes.base import Pass, PassResult, bare, graph_text, prove_equivalent


class Instrument:
    """Watches a compilation; every method may be overridden, none has to be."""

    def begin(self, steps: int) -> None:
        """Called once a list of passes is known to be sound, with the number of steps to come."""

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        """Called before a pass runs on the program, or on one stage of it."""

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        """Called after a pass has run and its contract was proven."""

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

    def add(self, result: PassResult) -> None:
        """Adds the result on one part."""
        self.stages += 1
        self.seconds += result.seconds
        self.modified |= result.modified
        if result.drift is not None:
            self.drift = max(self.drift or 0.0, result.drift)


@dataclass(frozen=True)
class PipelineResult:
    """A compiled program, and one record for each pass.

    Args:
        program: The result.
        records: In the order of the list.
        stages: The parts that block-scoped passes ran on.
        seconds: Time for the whole list, calibration and checks included.
    """

    program: Program
    records: list[PassRecord]
    stages: list[str]
    seconds: float


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order; consecutive block-scoped passes stage by stage.

    For each stage: run the passes on it as a Program of its own, calibrated with activations that
    come out of the already compressed stages before it; then propagate through the result. Two
    stages' worth of weights and activations are alive at any time.

    Args:
        passes: What to run; the order is the caller's and is never changed.
        memory: Budget for activations held in memory; beyond it they are on disk.
        instruments: Watchers: progress, dumps.
    """

    passes: Sequence[Pass]
    memory: str | int = "4GiB"
    instruments: Sequence[Instrument] = field(default=())

    def __call__(self, program: Program) -> PipelineResult:
        """Compiles a program.

        Raises:
            RequirementError: A pass needs a fact that nothing before it provides; raised before
                anything runs.
            CompileError: A pass failed; the program given is as it was.
        """
        check_requirements(self.passes, frozenset(program.facts))
        for number, step in enumerate(self.passes):
            step.check(program)
            if text := step.warning(self.passes[number + 1 :]):
                warnings.warn(text, stacklevel=2)
        verify(program)
        records = [PassRecord(p.name, _options(p)) for p in self.passes]
        started = time.perf_counter()
        stage_names: list[str] = []
        runs = _runs_of_scope(self.passes)
        stages = find_stages(program) if any(block for block, _ in runs) else []
        for instrument in self.instruments:
            count = max(len(stages), 1)
            instrument.begin(sum(len(r) * (count if block else 1) for block, r in runs))
        try:
            for is_block, numbers in runs:
                stages = find_stages(program) if is_block else []
                if len(stages) > 1:
                    program = self._run_stages(program, stages, numbers, records)
                    stage_names = [", ".join(stage.modules) or stage.name for stage in stages]
                else:
                    for number in numbers:
                        program = self._run(program, number, records, "program")
        finally:
            for instrument in self.instruments:
                instrument.end()
        return PipelineResult(program, records, stage_names, time.perf_counter() - started)

    def _run(self, program: Program, number: int, records: list[PassRecord], part: str) -> Program:
        step = self.passes[number]
        for instrument in self.instruments:
            instrument.before_pass(step, program, part)
        result = step(program)
        records[number].add(result)
        for instrument in self.instruments:
            instrument.after_pass(step, result, part)
        return result.program

    def _run_stages(
        self,
        program: Program,
        stages: list[Stage],
        numbers: list[int],
        records: list[PassRecord],
    ) -> Program:
        """Runs block-scoped passes stage by stage on propagated activations."""
        last = self._last_stage(program, stages, numbers)
        current = program
        parts: list[Program] = []
        rewired = False
        batches = program.calibration or [program.example_inputs]
        asked = any(self.passes[number].uses_dense_outputs for number in numbers)
        two = asked and bool(program.calibration)
        unpruned = _unpruned(program)
        budget = parse_bytes(self.memory) // (2 if two else 1)
        with Stream(batches, budget) as stream, Stream(batches if two else (), budget) as dense:
            for k, stage in enumerate(stages[: last + 1]):
                part = extract_stage(current, stage, stream)
                if not program.calibration:
                    part = dataclasses.replace(part, calibration=())
                if two:
                    _propagate(extract_stage(unpruned, stage, dense), dense)
                    part = dataclasses.replace(
                        part,
                        dense_outputs=Restricted(dense, part.outputs),
                        dense_inputs=Restricted(dense, part.inputs),
                    )
                before = part
                for number in numbers:
                    part = self._run(part, number, records, stage.name)
                rewired |= graph_text(part) != graph_text(before)
                # Only the graph is stitched in: the activations of a finished stage may go.
                finished = dataclasses.replace(bare(part), facts=part.facts, example_inputs={})
                parts.append(dataclasses.replace(finished, dense=None))
                current = _commit(current, before, part)
                if k < last:
                    found = [self.passes[number].propagate(part) for number in numbers]
                    _propagate(part, stream, next((f for f in reversed(found) if f), None))
                    alive = {node.name for later in stages[k + 1 :] for node in later.inputs}
                    for values in (stream, dense):
                        values.keep_only(alive | set(program.inputs))
                return_freed_memory()
        if rewired:
            parts += [extract_stage(current, stage, ()) for stage in stages[last + 1 :]]
        ran = last + 1
        return self._assemble(program, current, parts if rewired else [], numbers, ran)

    def _assemble(
        self,
        program: Program,
        current: Program,
        parts: list[Program],
        numbers: list[int],
        ran: int,
    ) -> Program:
        """Puts the result of so many stages together: weights, facts, and graphs that are new."""
        changed = current.weights.changed_since(program.weights)
        updates = {name: current.weights.source(name) for name in changed}
        known = {name: source for name, source in updates.items() if name in program.weights}
        base = stitch_stages(program, parts) if parts else program
        result = base.with_weights(known).with_fact(*current.facts.values())
        steps = [self.passes[number] for number in numbers]
        stale: set[type[Fact]] = set()
        for step in steps:
            stale = (stale | set(step.invalidates)) - set(step.provides)
        result = result.without_facts(stale)
        verify(result, after=steps[-1].name)
        if changed and any(step.is_lossy(program) for step in steps):
            result = dataclasses.replace(result, dense=program.dense or bare(program))
        if changed and not any(step.lossy for step in steps):
            # Each stage was allowed to move by the tolerance, and that adds up.
            slack = ran * max(step.slack for step in steps)
            prove_equivalent(program, result, ", ".join(step.name for step in steps), slack)
        return result

    def _last_stage(self, program: Program, stages: list[Stage], numbers: list[int]) -> int:
        """The last stage that has anything to work on: activations need not flow any further."""
        targets: set[str] = set()
        for number in numbers:
            found = self.passes[number].targets(program)
            if found is None:
                return len(stages) - 1
            targets |= found
        used = {
            use.node
            for linear in find_linears(program)
            for use in linear.uses
            if linear.name in targets
        }
        touched = [k for k, stage in enumerate(stages) if not used.isdisjoint(stage.nodes)]
        return max(touched, default=0)


def _unpruned(program: Program) -> Program:
    """The program with the weights that it had before any lossy pass, where its graph still is that one."""
    dense = program.dense
    if dense is None or graph_text(dense) != graph_text(program):
        return program
    return dataclasses.replace(program, weights=dense.weights)


def _commit(current: Program, before: Program, part: Program) -> Program:
    """Takes a finished stage's weights and facts over; its graph is stitched in at the end."""
    updates = {n: part.weights.source(n) for n in part.weights.changed_since(before.weights)}
    current = dataclasses.replace(current, weights=current.weights.replace(updates))
    return merge_facts(current, part)


def _propagate(part: Program, stream: Stream, run: Callable[[Batch], Batch] | None = None) -> None:
    """Runs a stage, as it is or by a function, on every batch of a stream, which it adds its outputs to."""
    run = run or part.loaded().run
    for index in range(len(stream)):
        stream.write(index, run({name: stream[index][name] for name in part.inputs}))


def check_requirements(passes: Sequence[Pass], known: frozenset[type[Fact]]) -> None:
    """Checks that every fact a pass requires is known, or provided and not invalidated, before it.

    Raises:
        RequirementError: It is not; names the passes that provide it.
    """
    from zeroskip.passes import PASSES

    lost: dict[type[Fact], str] = {}
    have = set(known)
    for step in passes:
        for kind in step.requires:
            if kind in have:
                continue
            providers = [name for name, cls in PASSES.items() if kind in cls.provides]
            reason = f": {lost[kind]} invalidated it" if kind in lost else ""
            raise RequirementError(
                f"{step.name} needs {kind.__name__}, which nothing before it provides{reason}",
                pass_name=step.name,
                next_step=f"put {' or '.join(providers) or 'a pass that provides it'} before it",
            )
        lost.update({kind: step.name for kind in step.invalidates if kind in have})
        have -= set(step.invalidates)
        have |= set(step.provides)


def _runs_of_scope(passes: Sequence[Pass]) -> list[tuple[bool, list[int]]]:
    """Groups consecutive passes of the same scope: (block-scoped, positions)."""
    runs: list[tuple[bool, list[int]]] = []
    for number, step in enumerate(passes):
        is_block = step.scope == "block"
        if not runs or runs[-1][0] != is_block:
            runs.append((is_block, []))
        runs[-1][1].append(number)
    return runs


def _options(step: Pass) -> dict[str, Any]:
    return {f.name: getattr(step, f.name) for f in fields(step)}
