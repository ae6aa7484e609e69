"""PassManager: stage by stage is the whole at once, spilled or not; watchers; failures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.passes import references
from tests.zoo import ZOO
from zeroskip.ir.errors import CompileError, EquivalenceError
from zeroskip.ir.facts import Lowered, Mask, SparseWeights
from zeroskip.ir.partition import find_stages
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, RewriteRule, apply_rules
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import (
    ApplyMasks,
    DumpPrograms,
    Instrument,
    LowerMasked,
    Observe,
    Pass,
    PassManager,
    PassResult,
    PruneMagnitude,
    PruneWanda,
)
from zeroskip.passes.base import Scope

aten = torch.ops.aten
BATCHES = [ZOO["llama"].inputs(2, 21), ZOO["llama"].inputs(3, 12, padded=True)]
WANDA: tuple[Pass, ...] = (Observe(), PruneWanda("2:4"), ApplyMasks())


@pytest.fixture
def llama(captured: Callable[[str], Program]) -> Program:
    return dataclasses.replace(captured("llama"), calibration=BATCHES)


def masks_of(program: Program) -> dict[str, Mask]:
    return dict(program.fact(SparseWeights).masks)


def assert_same(first: Program, second: Program) -> None:
    one, two = masks_of(first), masks_of(second)
    assert list(one) == list(two)
    for name, mask in one.items():
        assert torch.equal(mask.bits, two[name].bits), name
    for name in first.weights:
        assert torch.equal(first.weights[name], second.weights[name]), name
    assert print_program(first) == print_program(second)


@dataclass
class Log(Instrument):
    """Writes down every call."""

    lines: list[tuple[str, ...]] = field(default_factory=list)

    def begin(self, steps: int) -> None:
        self.lines.append(("begin", str(steps)))

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        self.lines.append(("before", step.name, part))

    def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
        self.lines.append(("after", step.name, part))

    def end(self) -> None:
        self.lines.append(("end",))


def test_streaming_is_the_sequential_loop(llama: Program) -> None:
    result = PassManager(WANDA)(llama)
    assert len(result.stages) == 4
    assert [record.stages for record in result.records] == [3, 3, 3]
    model = ZOO["llama"].model()
    expected = references.wanda(model, model.model.layers, BATCHES, "2:4")
    assert {n: m.keep().tolist() for n, m in masks_of(result.program).items()} == {
        name: kept.tolist() for name, kept in expected.items()
    }


def test_statistics_come_from_pruned_activations(llama: Program) -> None:
    dense = PassManager([Observe()])(llama).program.fact(Statistics).edges
    seen: dict[str, torch.Tensor] = {}

    class Reads(Instrument):
        def after_pass(self, step: Pass, result: PassResult, part: str) -> None:
            if step.name == "observe":
                edges = result.program.fact(Statistics).edges
                seen.update({name: edge.total_of_squares for name, edge in edges.items()})

    PassManager(WANDA, instruments=(Reads(),))(llama)
    first = [n for n in dense if ".layers.0." in n]
    later = [n for n in dense if ".layers.1." in n]
    assert all(torch.equal(seen[n], dense[n].total_of_squares) for n in first)
    assert not any(torch.equal(seen[n], dense[n].total_of_squares) for n in later)


class ObserveBoth(Observe):
    """Asks for the outputs of unpruned stages."""

    @property
    def uses_dense_outputs(self) -> bool:
        return True


Outputs = dict[str, list[dict[str, torch.Tensor]]]


def stage_outputs(program: Program, steps: list[Pass], memory: str) -> tuple[Outputs, Outputs]:
    """By stage and batch: the dense outputs that a pass is given, and what the stage computes."""
    given: Outputs = {}
    computed: Outputs = {}

    class Reads(Instrument):
        def before_pass(self, step: Pass, program: Program, part: str) -> None:
            if step.name == "observe":
                given[part] = [dict(batch) for batch in program.dense_outputs]
                inputs = [{n: b[n] for n in program.inputs} for b in program.calibration]
                computed[part] = [dict(program.run(batch)) for batch in inputs]

    PassManager(steps, memory, (Reads(),))(program)
    return given, computed


@pytest.mark.parametrize("memory", ["4GiB", "1KiB"])
def test_dense_outputs_come_out_of_unpruned_stages(llama: Program, memory: str) -> None:
    steps = [ObserveBoth(), PruneWanda("2:4"), ApplyMasks()]
    given, pruned = stage_outputs(llama, steps, memory)
    nothing, dense = stage_outputs(llama, [Observe()], memory)
    assert set(given) == set(pruned) == set(dense)
    assert not any(any(batches) for batches in nothing.values())  # Nobody asked.
    for part, batches in given.items():
        for batch, expected, propagated in zip(batches, dense[part], pruned[part], strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
            same = [torch.equal(batch[name], propagated[name]) for name in batch]
            # Embeddings are not pruned: the first layer gets what it always got.
            assert all(same) == (part != "stage 2")


def test_observing_in_stages_is_observing_at_once(llama: Program) -> None:
    staged = PassManager([Observe(gram=True)])(llama).program.fact(Statistics).edges
    whole = Observe(gram=True)(llama).program.fact(Statistics).edges
    assert list(staged) == list(whole)
    for name, edge in whole.items():
        assert edge.gram is not None
        assert staged[name].count == edge.count
        assert torch.equal(staged[name].total_of_squares, edge.total_of_squares), name
        assert torch.equal(staged[name].gram, edge.gram), name  # type: ignore[arg-type]


def test_activations_on_disk_give_the_same_bits(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled = 0

    class Counts(Instrument):
        def before_pass(self, step: Pass, program: Program, part: str) -> None:
            nonlocal spilled
            spilled = max(spilled, len(list(tmp_path.rglob("*.safetensors"))))

    tight = PassManager(WANDA, memory="1KiB", instruments=(Counts(),))(llama).program
    assert spilled
    assert list(tmp_path.iterdir()) == []
    assert_same(tight, PassManager(WANDA, memory="1TiB")(llama).program)


def test_two_runs_are_equal_to_the_bit(llama: Program) -> None:
    assert_same(PassManager(WANDA)(llama).program, PassManager(WANDA)(llama).program)


def test_instruments_are_called_in_order(llama: Program) -> None:
    first, second = Log(), Log()
    steps = [*WANDA, LowerMasked()]
    PassManager(steps, instruments=(first, second))(llama)
    names = [step.name for step in WANDA]
    expected: list[tuple[str, ...]] = []
    # Behind the last decoder layer there is only the head, which is not pruned.
    for stage in ("stage 0", "stage 1", "stage 2"):
        for name in names:
            expected += [("before", name, stage), ("after", name, stage)]
    expected += [("before", "lower-masked", "program"), ("after", "lower-masked", "program")]
    assert first.lines[0][0] == "begin"
    assert first.lines[1:] == [*expected, ("end",)]
    assert int(first.lines[0][1]) >= len(expected) // 2
    assert second.lines == first.lines


def test_stages_behind_the_last_target_are_skipped(llama: Program) -> None:
    log = Log()
    only_first = ("model.layers.0.*",)
    steps = [Observe(include=only_first), PruneWanda("2:4", include=only_first), ApplyMasks()]
    # apply-masks has no targets before the masks are known, so they do not keep stages running.
    result = PassManager(steps, instruments=(log,))(llama)
    assert {line[2] for line in log.lines if line[0] == "after"} == {"stage 0", "stage 1"}
    assert all(name.startswith("model.layers.0.") for name in masks_of(result.program))
    dense = llama.weights
    for name in dense:
        if ".layers.1." in name:
            assert result.program.weights.source(name) is dense.source(name)


def test_programs_are_dumped_in_order(llama: Program, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dump"
    steps = [PruneMagnitude("2:4"), ApplyMasks(), LowerMasked()]
    result = PassManager(steps, instruments=(DumpPrograms(folder),))(llama)
    files = sorted(file.name for file in folder.iterdir())
    assert [name[:4] for name in files] == [f"{n:04d}" for n in range(len(files))]
    assert files[0] == "0000-stage-0-prune-magnitude-before.txt"
    assert files[1] == "0001-stage-0-prune-magnitude-after.txt"
    assert files[-1].endswith("program-lower-masked-after.txt")
    assert (folder / files[-1]).read_text() == print_program(result.program)


@dataclass(frozen=True)
class FailsAt(Pass):
    """Raises on the part that holds a linear."""

    linear: str

    name = "fails-at"

    @property
    def scope(self) -> Scope:
        return "block"

    def run(self, program: Program) -> Program:
        if self.linear in program.weights:
            raise CompileError("planted", where=self.linear)
        return program


def test_a_failure_in_the_middle_leaves_the_program_usable(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = print_program(llama)
    sources = {name: llama.weights.source(name) for name in llama.weights}
    versions = {name: llama.weights[name]._version for name in llama.weights}
    before = llama.run(llama.example_inputs)["logits"]
    log = Log()
    steps = [*WANDA, FailsAt("model.layers.1.mlp.down_proj.weight")]
    with pytest.raises(CompileError, match="planted") as caught:
        PassManager(steps, memory="1KiB", instruments=(log,))(llama)
    assert caught.value.pass_name == "fails-at"
    assert ("after", "apply-masks", "stage 1") in log.lines
    assert log.lines[-1] == ("end",)
    assert list(tmp_path.iterdir()) == []
    assert print_program(llama) == text
    assert all(llama.weights.source(name) is source for name, source in sources.items())
    assert all(llama.weights[name]._version == v for name, v in versions.items())
    assert torch.equal(llama.run(llama.example_inputs)["logits"], before)
    PassManager(WANDA)(llama)


@dataclass(frozen=True)
class ScalesGates(Pass):
    """Rewrites silu(x) to silu(x) * factor, block by block."""

    factor: float = 1.0

    name = "scales-gates"

    @property
    def scope(self) -> Scope:
        return "block"

    def run(self, program: Program) -> Program:
        def put(editor: Editor, x: torch.fx.Node) -> torch.fx.Node:
            return editor.call(aten.mul.Tensor, editor.call(aten.silu.default, x), self.factor)

        rule = RewriteRule("silu(x) = silu(x) * 1", lambda x: aten.silu.default(x), put)
        return apply_rules(program, [rule])[0]


@dataclass(frozen=True)
class MasksInBlocks(LowerMasked):
    """lower-masked, one block at a time."""

    name = "masks-in-blocks"

    @property
    def scope(self) -> Scope:
        return "block"


def test_new_graphs_of_stages_are_stitched(llama: Program) -> None:
    assert len(find_stages(llama)) == 4
    result = PassManager([ScalesGates()])(llama)
    assert result.records[0].modified
    assert result.records[0].drift == 0
    products = [print_program(p).count(" mul(") for p in (llama, result.program)]
    assert products[1] - products[0] == 2
    assert result.program.inputs == llama.inputs
    for batch in (llama.example_inputs, *BATCHES):
        assert torch.equal(result.program.run(batch)["logits"], llama.run(batch)["logits"])
    assert print_program(llama) != print_program(result.program)


def test_a_stitched_program_is_pruned_like_the_first(llama: Program) -> None:
    stitched = PassManager([ScalesGates(), *WANDA])(llama).program
    plain = PassManager(WANDA)(llama).program
    assert {n: m.bits.tolist() for n, m in masks_of(stitched).items()} == {
        n: m.bits.tolist() for n, m in masks_of(plain).items()
    }
    assert torch.equal(
        stitched.run(llama.example_inputs)["logits"], plain.run(llama.example_inputs)["logits"]
    )


def test_a_wrong_rewrite_of_a_stage_is_caught(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EquivalenceError) as caught:
        PassManager([ScalesGates(1.5)])(llama)
    assert caught.value.pass_name == "scales-gates"


def test_stages_can_be_lowered_one_by_one(llama: Program) -> None:
    steps: list[Pass] = [PruneMagnitude("2:4"), ApplyMasks()]
    pruned = PassManager(steps)(llama).program
    blocks = PassManager([MasksInBlocks()])(pruned).program
    whole = PassManager([LowerMasked()])(pruned).program
    assert blocks.level == whole.level == "lowered"
    assert blocks.fact(Lowered) == whole.fact(Lowered)
    for batch in BATCHES:
        assert torch.equal(blocks.run(batch)["logits"], whole.run(batch)["logits"])


def test_an_empty_list_changes_nothing(llama: Program) -> None:
    result = PassManager([])(llama)
    assert result.program is llama
    assert result.records == []


def test_a_budget_that_is_no_size_is_refused(llama: Program) -> None:
    with pytest.raises(CompileError, match="'plenty' is not a size") as caught:
        PassManager(WANDA, memory="plenty")(llama)
    assert caught.value.next_step


def test_records_add_up(llama: Program) -> None:
    result = PassManager(WANDA)(llama)
    observe, wanda, apply = result.records
    assert wanda.options == {"pattern": "2:4", "include": (), "exclude": ()}
    assert observe.drift is None
    assert wanda.drift is None
    assert apply.drift is not None
    assert apply.drift > 0.01
    assert all(record.modified for record in result.records)
    assert 0 < sum(record.seconds for record in result.records) <= result.seconds


def test_a_fact_that_was_known_before_is_gone_when_a_streamed_run_invalidates_it(
    llama: Program,
) -> None:
    observed = PassManager([Observe()])(llama).program
    assert Statistics in observed.facts
    pruned = PassManager([PruneWanda("2:4"), ApplyMasks()])(observed).program
    assert Statistics not in pruned.facts
