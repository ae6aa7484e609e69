"""Two processes of one group against one process: the same statistics, masks and weights."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kept_traces import capture_once as capture
from tests.processes import run_processes
from tests.zoo import ZOO
from zeroskip.ir import process_group
from zeroskip.ir.program import Program
from zeroskip.ir.stage_files import StageFiles
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import (
    AllocateSparsity,
    ApplyMasks,
    Instrument,
    Observe,
    Pass,
    PassManager,
    PruneSparseGPT,
    PruneWanda,
    ReconstructBlocks,
    ShiftToBias,
    TrainElastic,
)

# Five batches: the two processes have 3 and 2 of them.
SIZES = ((2, False), (3, True), (2, False), (1, False), (2, True))
RECIPES: dict[str, tuple[Pass, ...]] = {
    "wanda": (Observe(), PruneWanda("2:4"), ApplyMasks()),
    "allocated": (
        AllocateSparsity("50%", method="owl"),
        Observe(),
        PruneWanda("50%"),
        ApplyMasks(),
    ),
    "sparsegpt": (Observe(gram=True), PruneSparseGPT("50%"), ReconstructBlocks(epochs=1)),
    "biases": (Observe(), PruneWanda("50%"), ShiftToBias(add=True, parts=2), ApplyMasks()),
    "elastic": (TrainElastic(groups=(0.5, 0.75), rank=2, epochs=1, held_out=0.25),),
}


@dataclasses.dataclass(frozen=True)
class KeepStatistics(Instrument):
    """Collects what was observed; may kill its process when a number of passes has run."""

    seen: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    passes: list[str] = dataclasses.field(default_factory=list)
    last: int = 10**6

    def after_pass(self, step: Pass, result: Any, part: str) -> None:
        self.passes.append(step.name)
        if len(self.passes) >= self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        if step.name != "observe":
            return
        for name, edge in result.program.fact(Statistics).edges.items():
            self.seen[f"{name} count"] = torch.tensor([edge.count])
            self.seen[f"{name} total"] = edge.total.clone()
            self.seen[f"{name} squares"] = edge.total_of_squares.clone()
            self.seen[f"{name} peak"] = edge.abs_max.clone()
            if edge.gram is not None:
                self.seen[f"{name} gram"] = edge.gram.clone()


def compiled(program: Program, recipe: str, folder: Path, last: tuple[int, int] = (0, 0)) -> None:
    """Compiles in one process of a group; `last`: which of them dies, after how many passes."""
    rank, count = process_group.rank(), process_group.count()
    watcher = KeepStatistics(last=last[1] or 10**6 if rank == last[0] else 10**6)
    files = StageFiles(folder / f"stages-{count}", "key")
    result = PassManager(RECIPES[recipe], instruments=(watcher,), files=files)(program).program
    weights = {name: result.weights[name].contiguous() for name in result.weights}
    save_file(weights, folder / f"weights-{count}-{rank}.safetensors")
    save_file(watcher.seen, folder / f"seen-{count}-{rank}.safetensors")
    (folder / f"passes-{count}-{rank}.txt").write_text("\n".join(watcher.passes))


def a_program(architecture: str) -> Program:
    case = ZOO[architecture]
    batches = [case.inputs(rows, 9, padded=padded) for rows, padded in SIZES]
    program = capture(case.model(), case.inputs())
    return dataclasses.replace(program, calibration=batches)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [("llama", recipe) for recipe in RECIPES] + [("mixtral", "wanda"), ("bert", "sparsegpt")],
)
def test_two_processes_compile_as_one_does(tmp_path, architecture, recipe):
    program = a_program(architecture)
    for count in (1, 2):
        assert run_processes(count, tmp_path, compiled, program, recipe, tmp_path) == [0] * count
    alone = load_file(tmp_path / "weights-1-0.safetensors")
    seen = load_file(tmp_path / "seen-1-0.safetensors")
    before = {name: program.weights[name] for name in program.weights}
    changed = [n for n in alone if n not in before or not torch.equal(alone[n], before[n])]
    assert changed or recipe == "elastic"
    has_gram = recipe == "sparsegpt"
    for rank in (0, 1):
        together = load_file(tmp_path / f"weights-2-{rank}.safetensors")
        assert together.keys() == alone.keys()
        for name, weight in alone.items():
            # A float32 Gram matrix is added in another order, and what is trained starts from it.
            if has_gram:
                torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(together[name], weight), name
        observed = load_file(tmp_path / f"seen-2-{rank}.safetensors")
        assert observed.keys() == seen.keys()
        first = next(iter(seen), "").partition(" ")[0]
        for name, value in seen.items():
            if name.endswith("gram"):
                assert (observed[name] - value).norm() <= 1e-4 * value.norm()
            elif not has_gram or name.startswith(first):
                assert torch.equal(observed[name], value), name
    first, second = (load_file(tmp_path / f"weights-2-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_all_and_the_next_run_goes_on(tmp_path, dying):
    program = a_program("llama")
    # In the second layer: the first one is finished by then.
    codes = run_processes(2, tmp_path, compiled, program, "wanda", tmp_path, (dying, 5))
    assert codes[dying] == -signal.SIGKILL
    assert codes[1 - dying] > 0
    said = (tmp_path / f"traceback-{1 - dying}.txt").read_text()
    assert f"process {1 - dying} of 2 lost the others" in said
    assert run_processes(2, tmp_path, compiled, program, "wanda", tmp_path) == [0, 0]
    assert run_processes(1, tmp_path, compiled, program, "wanda", tmp_path) == [0]
    again = (tmp_path / "passes-2-0.txt").read_text().split()
    assert len(again) < len((tmp_path / "passes-1-0.txt").read_text().split())
    alone = load_file(tmp_path / "weights-1-0.safetensors")
    found = load_file(tmp_path / "weights-2-1.safetensors")
    assert all(torch.equal(found[name], alone[name]) for name in alone)
