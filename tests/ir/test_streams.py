"""Streams keep to their budget, give back the same bits and leave nothing behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroskip.ir.errors import ArtifactError, CompileError
from zeroskip.ir.streams import Stream, parse_bytes

Batches = list[dict[str, Tensor]]


def batches(count: int = 3) -> Batches:
    """80 bytes and 24 bytes each, with values that a lossy round trip would change."""
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    return [
        {
            "x": torch.cat([special, torch.randn(16)]).reshape(4, 5).T,
            "ids": torch.randint(0, 9, (3,)) + i,
        }
        for i in range(count)
    ]


def same(stream: Stream, expected: Batches) -> bool:
    return len(stream) == len(expected) and all(
        found.keys() == wanted.keys()
        and all(
            found[k].dtype == wanted[k].dtype
            and found[k].shape == wanted[k].shape
            and found[k].numpy().tobytes() == wanted[k].numpy().tobytes()
            for k in wanted
        )
        for found, wanted in zip((stream[i] for i in range(len(stream))), expected, strict=True)
    )


@pytest.mark.parametrize("budget", [0, 1, 24, 80, 100, 104, 200, 10_000])
def test_values_come_back_bitwise_within_the_budget(budget: int, tmp_path: Path) -> None:
    data = batches()
    with Stream(data, budget, tmp_path) as stream:
        assert stream.bytes_in_memory <= budget
        assert same(stream, data)
        assert same(stream, data), "a second read gives the same"
        spilled = len(list(tmp_path.glob("*/*.safetensors")))
        assert (spilled == 0) == (budget >= 3 * 104)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_all_fits(tmp_path: Path) -> None:
    with Stream(batches(), 3 * 104, tmp_path) as stream:
        assert stream.bytes_in_memory == 3 * 104
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64])
def test_every_dtype_survives_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randn(4, 5).to(dtype)
    with Stream([{"x": value, "empty": value[:0]}], 0, tmp_path) as stream:
        assert stream[0]["x"].dtype == dtype
        assert torch.equal(stream[0]["x"], value)
        assert stream[0]["empty"].shape == (0, 5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 400),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(0, 40)), max_size=20),
)
def test_the_budget_holds_after_any_writes(budget: int, writes: list[tuple[int, str, int]]) -> None:
    model: Batches = [{}, {}, {}]
    with Stream([{}, {}, {}], budget) as stream:
        for index, name, size in writes:
            value = torch.full((size,), float(len(name) + size))
            stream.write(index, {name: value})
            model[index][name] = value
            assert 0 <= stream.bytes_in_memory <= budget
            assert same(stream, model)
        stream.keep_only(["b"])
        assert same(stream, [{k: v for k, v in m.items() if k == "b"} for m in model])
        stream.keep_only([])
        assert stream.bytes_in_memory == 0


def test_replacing_and_forgetting_frees_memory_and_files(tmp_path: Path) -> None:
    with Stream(batches(2), 104, tmp_path) as stream:
        assert len(list(tmp_path.glob("*/*"))) == 2
        stream.write(1, {"x": torch.ones(1)})
        assert len(list(tmp_path.glob("*/*"))) == 2
        stream.keep_only(["ids"])
        assert stream.bytes_in_memory == 24
        stream.write(1, {"ids": torch.zeros(3, dtype=torch.int64)})
        assert stream.bytes_in_memory == 48
        assert list(tmp_path.glob("*/*")) == []
        assert set(stream[0]) == {"ids"}
        with pytest.raises(KeyError):
            stream[0]["x"]


def test_gradients_are_not_kept(tmp_path: Path) -> None:
    value = torch.ones(3, requires_grad=True) * 2
    for budget in (0, 100):
        with Stream([{"x": value}], budget, tmp_path) as stream:
            assert not stream[0]["x"].requires_grad


def test_files_are_removed_when_the_work_fails(tmp_path: Path) -> None:
    def work() -> None:
        with Stream(batches(), 0, tmp_path):
            assert list(tmp_path.glob("*/*"))
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    stream = Stream(batches(), 0, tmp_path)
    stream.close()
    stream.close()
    assert len(stream) == 0
    assert stream.bytes_in_memory == 0


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ArtifactError, match="cannot write activations") as raised:
        Stream(batches(), 0, missing)
    assert str(missing) in str(raised.value)
    assert "TMPDIR" not in str(raised.value)  # It would change nothing.
    monkeypatch.setattr(tempfile, "tempdir", str(missing))
    with pytest.raises(ArtifactError, match="set TMPDIR to a larger disk") as raised:
        Stream(batches(), 0)
    assert str(missing) in str(raised.value)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write activations"):
        Stream(batches(), 0, tmp_path / "file")


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    with Stream(batches(1), 0, tmp_path) as stream:
        (folder,) = tmp_path.iterdir()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        with pytest.raises(ArtifactError, match="cannot write activations"):
            stream.write(0, {"y": torch.ones(3)})


def test_a_failed_start_leaves_no_files(tmp_path: Path) -> None:
    """The with block is never entered, so nobody else could remove them."""

    def broken() -> list[dict[str, Tensor]]:
        raise ValueError("planted")

    def data() -> object:
        yield batches(1)[0]
        yield broken()

    with pytest.raises(ValueError, match="planted"):
        Stream(data(), 0, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_spilled_file_that_was_damaged(tmp_path: Path) -> None:
    with Stream(batches(1), 0, tmp_path) as stream:
        file = next(tmp_path.glob("*/*x.safetensors"))
        os.truncate(file, 20)
        with pytest.raises(ArtifactError):
            stream[0]["x"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5kb", 1500),
        (" .5 MB ", 500_000),
        ("1TB", 10**12),
        ("17", 17),
        ("17 b", 17),
        (0, 0),
        (1024, 1024),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "4 gigs", "1.2.3MB", ".", "1..MB", "4GiBs", "1e9", "nan", "inf", -5],
)
def test_what_is_not_a_size(text: str | int) -> None:
    with pytest.raises(CompileError, match="is not a size"):
        parse_bytes(text)
