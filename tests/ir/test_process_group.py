from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import run_processes
from zeroskip.ir import process_group
from zeroskip.ir.errors import CompileError
from zeroskip.ir.shared_streams import SharedStream, own_batches


def test_one_process_is_a_group_of_its_own():
    value = torch.arange(3)
    assert (process_group.count(), process_group.rank(), process_group.is_first()) == (1, 0, True)
    assert list(process_group.mine(3)) == [0, 1, 2]
    assert process_group.share_out([5, 1]) == [0, 0]
    for same in (process_group.summed, process_group.largest):
        assert same(value) is value
    assert process_group.gathered(value, 3) is value
    assert process_group.from_owner(value, 0) is value
    with SharedStream([{"x": value}], 100) as stream:
        assert torch.equal(stream[0]["x"], value)
        assert [index for index, _ in own_batches(stream)] == [0]


def exchange(folder: Path) -> None:
    rank, count = process_group.rank(), process_group.count()
    rows = torch.tensor([[10.0 * i, float(i)] for i in process_group.mine(5)])
    named = {"b": torch.tensor([[1, 2]], dtype=torch.int16), "a": torch.tensor([True, False])}
    received = process_group.sent_values(named if rank == 1 else None, 1)
    save_file(
        {
            "gathered": process_group.gathered(rows, 5),
            "summed": process_group.summed(torch.tensor([rank + 1.0])),
            "largest": process_group.largest(torch.tensor([rank, -rank])),
            "bool": process_group.from_owner(torch.tensor([rank == count - 1]), count - 1),
            **received,
        },
        folder / f"{rank}.safetensors",
    )
    assert process_group.sent_values({} if rank == 0 else None, 0) == {}


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_receives_the_same(tmp_path, count):
    assert run_processes(count, tmp_path, exchange, tmp_path) == [0] * count
    for rank in range(count):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found["gathered"].tolist() == [[10.0 * i, float(i)] for i in range(5)]
        assert found["summed"].item() == sum(range(1, count + 1))
        assert found["largest"].tolist() == [count - 1, 0]
        assert found["bool"].tolist() == [True]
        assert found["b"].dtype == torch.int16
        assert found["b"].tolist() == [[1, 2]]
        assert found["a"].tolist() == [True, False]


def share() -> None:
    assert process_group.share_out([1, 9, 4, 4]) == [1, 0, 1, 1]
    assert process_group.share_out([]) == []


def test_the_dearest_work_goes_first_to_whom_has_least(tmp_path):
    assert run_processes(2, tmp_path, share) == [0, 0]


def stream() -> None:
    batches = [{"x": torch.full((1, 2), float(i))} for i in range(5)]
    with SharedStream(batches, 1000) as values:
        own = list(own_batches(values))
        assert [i for i, _ in own] == list(process_group.mine(5))
        for index, batch in own:
            values.write(index, {"y": batch["x"] * 10})
        # Only its owner ever computed y; all of them read it, the last one by a negative index.
        assert [float(batch["y"][0, 0]) for batch in values] == [0, 10, 20, 30, 40]
        assert float(values[-1]["y"][0, 1]) == 40


def test_a_shared_stream_reads_what_another_process_computed(tmp_path):
    assert run_processes(2, tmp_path, stream) == [0, 0]


def lose_one(folder: Path) -> None:
    if process_group.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        process_group.summed(torch.ones(1))
    except CompileError as error:
        (folder / "said.txt").write_text(str(error))


def test_a_process_that_dies_is_named_as_the_cause(tmp_path):
    assert run_processes(2, tmp_path, lose_one, tmp_path)[1] == -signal.SIGKILL
    said = (tmp_path / "said.txt").read_text()
    assert "process 0 of 2 lost the others" in said
    assert "finished layers are kept" in said
