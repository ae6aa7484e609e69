"""PassManager: runs a list of passes in the order given, and says what each one did."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from zeroskip.ir import process_group
from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.memory import return_freed_memory
from zeroskip.ir.partition import Stage, find_stages
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.shared_streams import SharedStream, own_batches
from zeroskip.ir.stage_files import StageFiles
from zeroskip.ir.stages import Restricted, extract_stage, merge_facts, stitch_stages
from zeroskip.ir.streams import Stream, parse_bytes
from zeroskip.ir.verify import verify
from zeroskip.passes.base import Pass, PassResult, bare, graph_text, prove_equivalent
from zeroskip.passes.record_passes import Instrument, PassNote, PassRecord
from zeroskip.passes.resume_stages import Journal


@dataclass(frozen=True)
class PipelineResult:
    """A compiled program, and one record for each pass.

    Args:
        program: The result.
        records: In the order of the list.
        stages: The parts that block-scoped passes ran on.
        seconds: Time for the whole list, calibration and checks included; of this run, where an
            earlier one had finished a part.
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
        files: Where finished stages are kept, and found again by the next run of the same list on
            the same program; None keeps none. The result reads weights from there.
    """

    passes: Sequence[Pass]
    memory: str | int = "4GiB"
    instruments: Sequence[Instrument] = field(default=())
    files: StageFiles | None = None

    def __call__(self, program: Program) -> PipelineResult:
        """Compiles a program.

        Raises:
            RequirementError: A pass needs a fact that nothing before it provides; raised before
                anything runs.
            CompileError: A pass failed; the program given is as it was.
        """
        check_passes(self.passes, program)
        for number, step in enumerate(self.passes):
            if text := step.warning(self.passes[number + 1 :]):
                warnings.warn(text, stacklevel=2)
        verify(program)
        if self.files is not None:
            if process_group.is_first():
                self.files.prepare()
            process_group.wait_for_all()
        records = [PassRecord(p.name, _options(p)) for p in self.passes]
        started = time.perf_counter()
        stage_names: list[str] = []
        journal = Journal(self.files, self.passes, records, self.instruments)
        runs = _runs_of_scope(self.passes)
        stages = find_stages(program) if any(block for block, _ in runs) else []
        for instrument in self.instruments:
            count = max(len(stages), 1)
            instrument.begin(sum(len(r) * (count if block else 1) for block, r in runs))
        try:
            for is_block, numbers in runs:
                stages = find_stages(program) if is_block else []
                if len(stages) > 1:
                    program = self._run_stages(program, stages, numbers, journal)
                    stage_names = [", ".join(stage.modules) or stage.name for stage in stages]
                else:
                    for number in numbers:
                        program = self._run_whole(program, number, journal)
        finally:
            for instrument in self.instruments:
                instrument.end()
        return PipelineResult(program, records, stage_names, time.perf_counter() - started)

    def _run(self, program: Program, number: int, part: str) -> PassResult:
        step = self.passes[number]
        for instrument in self.instruments:
            instrument.before_pass(step, program, part)
        result = step(program)
        for instrument in self.instruments:
            instrument.after_pass(step, result, part)
        return result

    def _run_whole(self, program: Program, number: int, journal: Journal) -> Program:
        journal.enter([number], program, ["program"])
        if journal.count_finished():
            return journal.read(0, program)
        result = self._run(program, number, "program")
        if not result.modified:
            # There is nothing to keep, and what it is there for (an export) may be outside.
            journal.note([PassNote.of(result)])
            return result.program
        return journal.write(0, program, result.program, [PassNote.of(result)])

    def _run_stages(
        self,
        program: Program,
        stages: list[Stage],
        numbers: list[int],
        journal: Journal,
    ) -> Program:
        """Runs block-scoped passes stage by stage on propagated activations."""
        last = self._last_stage(program, stages, numbers)
        journal.enter(numbers, program, [stage.name for stage in stages[: last + 1]])
        finished = journal.count_finished()
        current = program
        parts: list[Program] = []
        rewired = False
        # Where every stage is finished, nobody needs activations.
        batches = (program.calibration or [program.example_inputs]) if finished <= last else ()
        asked = any(self.passes[number].uses_dense_outputs for number in numbers)
        two = asked and bool(program.calibration) and bool(batches)
        unpruned = _unpruned(program)
        budget = parse_bytes(self.memory) // (2 if two else 1)
        folder = None if self.files is None else self.files.folder
        with (
            SharedStream(batches, budget, folder) as stream,
            SharedStream(batches if two else (), budget, folder) as dense,
        ):
            for k, stage in enumerate(stages[: last + 1]):
                part = extract_stage(current, stage, stream)
                if not program.calibration:
                    part = dataclasses.replace(part, calibration=())
                if unpruned is not program:
                    part = dataclasses.replace(part, dense=bare(extract_stage(unpruned, stage, ())))
                if two:
                    _propagate(extract_stage(unpruned, stage, dense), dense)
                    part = dataclasses.replace(
                        part,
                        dense_outputs=Restricted(dense, part.outputs),
                        dense_inputs=Restricted(dense, part.inputs),
                    )
                before = part
                if k < finished:
                    part = journal.read(k, before)
                else:
                    part = self._run_stage(k, before, numbers, journal)
                rewired |= graph_text(part) != graph_text(before)
                # Only the graph is stitched in: the activations of a finished stage may go.
                bared = dataclasses.replace(bare(part), facts=part.facts, example_inputs={})
                parts.append(dataclasses.replace(bared, dense=None))
                current = _commit(current, before, part)
                if k < last and batches:
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

    def _run_stage(
        self, index: int, before: Program, numbers: list[int], journal: Journal
    ) -> Program:
        part, notes = before, []
        for number in numbers:
            result = self._run(part, number, journal.parts[index])
            part = result.program
            notes.append(PassNote.of(result))
        return journal.write(index, before, part, notes)

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
    for index, batch in own_batches(stream):
        stream.write(index, run({name: batch[name] for name in part.inputs}))


def check_passes(passes: Sequence[Pass], program: Program) -> None:
    """Checks, before anything runs, that passes fit each other and the program.

    Raises:
        CompileError: They do not.
    """
    check_requirements(passes, frozenset(program.facts))
    for step in passes:
        step.check(program)


def check_requirements(passes: Sequence[Pass], known: frozenset[type[Fact]]) -> None:
    """Checks that every fact a pass requires is known, or provided and not invalidated, before it.

    Likewise that none is known that it refuses.

    Raises:
        RequirementError: It is not so; names the passes that provide the fact.
    """
    from zeroskip.passes import PASSES

    lost: dict[type[Fact], str] = {}
    have = set(known)
    makers: dict[type[Fact], str] = {}
    for step in passes:
        for kind in (kind for kind in step.refuses if kind in have):
            maker = makers.get(kind)
            raise RequirementError(
                f"{step.name} cannot follow what gives {kind.__name__}: "
                + (f"{maker} comes before it" if maker else "the program comes with it already"),
                pass_name=step.name,
                next_step=f"put {step.name} before {maker}"
                if maker
                else f"give {step.name} the program as it was before that",
            )
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
        makers |= dict.fromkeys(step.provides, step.name)


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
