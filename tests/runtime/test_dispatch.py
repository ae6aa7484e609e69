"""The rule that decides between sparse and dense, from made-up measurements; and what is kept."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeroskip.ir.errors import CompileError, KernelLibraryError, LoweringError
from zeroskip.ir.formats import BitmaskWeight, pack_bitmask
from zeroskip.runtime import dispatch, speed_table, timing, tuning
from zeroskip.runtime.dispatch import Candidate, Verdict, decide, judge
from zeroskip.runtime.kernels.location import library_path
from zeroskip.runtime.rivals import ONNX_RUNTIME, Rival
from zeroskip.runtime.speed_table import Table, load_table
from zeroskip.runtime.tuning import Measured, Tuner
from zeroskip.runtime.tuning_cache import TuningCache, tuning_file, write_atomically

PYTORCH = Rival("PyTorch")
HALF = Rival("PyTorch", torch.bfloat16)


def packed(
    rows: int = 64, columns: int = 64, density: float = 0.5, dtype: torch.dtype = torch.float32
) -> BitmaskWeight:
    weight = torch.ones(rows, columns)
    weight[:, round(columns * density) :] = 0
    scales = torch.full((rows, 1), 1 / 127) if dtype == torch.int8 else None
    return pack_bitmask(weight, dtype=dtype, scales=scales)


class MadeUp(Tuner):
    """Answers from a table instead of measuring."""

    def __init__(self, answers: Mapping[int, Measured], sets: str = "avx512 portable") -> None:
        self.answers, self.sets = answers, tuple(sets.split())
        self.asked: list[Mapping[str, object]] = []

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        return self.sets

    def measure(self, weight: BitmaskWeight, **options: object) -> dict[int, Measured]:  # type: ignore[override]
        self.asked.append(options)
        return {} if options["only_known"] else dict(self.answers)


def seen(*speedups: float, extra: int = 0) -> Measured:
    return Measured(dict(zip((1, 16, 128), speedups, strict=False)), 0.01, extra, {})


@pytest.mark.parametrize(
    ("speedups", "choice", "reason"),
    [
        ((1.7, 0.71, 1.4), "dense", "0.71x at m=16"),
        ((1.7, 0.97, 1.4), "sparse", "1.32x on average over m=1, 16, 128"),
        ((1.7, 0.969, 1.4), "dense", "0.97x at m=16"),
        ((0.98, 0.99, 1.0), "dense", "0.99x on average over m=1, 16, 128"),
        ((1.0,), "dense", "1.00x on average over m=1"),
        ((1.01,), "sparse", "1.01x at m=1"),
        ((2.0, 2.0, 2.0), "sparse", "2.00x on average over m=1, 16, 128"),
    ],
)
def test_sparse_only_where_no_m_loses_and_the_mean_wins(
    speedups: tuple[float, ...], choice: str, reason: str
) -> None:
    decision = decide({0: Candidate(seen(*speedups).speedup)})
    assert (decision.choice, decision.reason) == (choice, reason)


@pytest.mark.parametrize(
    ("stored", "repacked", "extra", "layout"),
    [
        ((2.0, 2.0), (2.05, 2.05), 100, 0),  # 2.5 % is not worth the memory
        ((2.0, 2.0), (2.07, 2.07), 100, 1),
        ((2.0, 2.0), (2.05, 2.05), 0, 1),  # no memory, so any gain is
        ((2.0, 0.7), (1.1, 1.1), 100, 1),  # the other does not qualify
        ((1.5, 1.5), (9.0, 0.5), 100, 0),
    ],
)
def test_a_layout_has_to_be_worth_its_memory(
    stored: Sequence[float], repacked: Sequence[float], extra: int, layout: int
) -> None:
    first, second = Candidate(seen(*stored).speedup), Candidate(seen(*repacked).speedup, extra)
    decision = decide({0: first, 1: second})
    assert (decision.choice, decision.layout) == ("sparse", layout)


def test_dense_names_the_objection_to_the_best_layout() -> None:
    first, second = Candidate({1: 0.5, 16: 0.4}), Candidate({1: 3.0, 16: 0.9}, 100)
    assert decide({0: first, 1: second}).reason == "0.90x at m=16"


def test_a_measured_verdict_is_complete_and_survives_json() -> None:
    tuner = MadeUp({0: seen(1.8, 0.9, 1.4), 1: seen(1.8, 1.1, 1.5, extra=700)})
    weight = packed(dtype=torch.bfloat16)
    verdict = judge(weight, m_values=(1, 16, 128), threads=3, source="measure", tuner=tuner)
    assert verdict == Verdict(
        rows=64,
        columns=64,
        density=0.5,
        value_type="bfloat16",
        accuracy_level=0,
        dense_bytes=64 * 64 * 4,
        packed_bytes=weight.nbytes,
        layout=1,
        speedup={1: 1.8, 16: 1.1, 128: 1.5},
        choice="sparse",
        reason="1.44x on average over m=1, 16, 128",
        source="measured",
        threads=3,
        extra_bytes=700,
        noise=0.01,
    )
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    assert tuner.asked[0]["threads"] == 3


def test_the_accuracy_level_is_of_int8_values_only() -> None:
    tuner = MadeUp({0: seen(2.0)})
    for dtype, level in ((torch.int8, 4), (torch.float32, 0)):
        verdict = judge(
            packed(dtype=dtype), m_values=[1], accuracy_level=4, source="measure", tuner=tuner
        )
        assert verdict.accuracy_level == level


def test_without_a_library_everything_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise KernelLibraryError("there is no kernel library, and no C++ compiler")

    monkeypatch.setattr(tuning, "library_path", missing)
    for source in ("measure", "table"):
        verdict = judge(packed(), m_values=[1], source=source)  # type: ignore[arg-type]
        assert verdict.choice == "dense"
        assert "no C++ compiler" in verdict.reason
        assert verdict.speedup == {}


@pytest.mark.parametrize(("m_values", "layouts"), [([], [0]), ([0], [0]), ([1], [])])
def test_nothing_to_judge_is_refused(m_values: list[int], layouts: list[int]) -> None:
    with pytest.raises(LoweringError, match="cannot be judged"):
        judge(packed(), m_values=m_values, layouts=layouts, tuner=MadeUp({0: seen(2.0)}))


def test_an_empty_weight_is_dense() -> None:
    weight = pack_bitmask(torch.zeros(0, 8))
    assert judge(weight, m_values=[1], tuner=MadeUp({0: seen(2.0)})).choice == "dense"


TABLE = Table(
    {
        "avx512/float32/0/0": {
            0.5: {1: 1.7, 4: 1.6, 16: 0.7, 128: 1.1},
            0.25: {1: 2.5, 4: 2.0, 16: 1.1, 128: 1.6},
            0.1: {1: 5.0, 4: 2.9, 16: 1.7, 128: 3.0},
        }
    }
)


@pytest.mark.parametrize(
    ("density", "m_values", "expected"),
    [
        (0.5, [1, 16], {1: 1.7, 16: 0.7}),
        (0.4, [1], {1: 1.7}),  # between 0.25 and 0.5: the denser
        (0.25, [8], {8: 1.1}),  # between 4 and 16: the lower
        (0.25, [64], {64: 1.1}),
        (0.05, [512], {512: 3.0}),
        (0.55, [1], None),
    ],
)
def test_the_table_answers_with_the_worse_neighbour(
    density: float, m_values: list[int], expected: dict[int, float] | None
) -> None:
    assert TABLE.speedups("avx512", "float32", 0, 0, density, m_values) == expected


@pytest.mark.parametrize(
    ("sets", "dtype", "density", "m_values", "choice"),
    [
        ("avx512 portable", torch.float32, 0.5, [1], "sparse"),
        ("avx512 portable", torch.float32, 0.5, [1, 16], "dense"),
        ("avx512 portable", torch.float32, 0.51, [1], "sparse"),  # rounds to 0.5
        ("avx512 portable", torch.float32, 0.6, [1], "dense"),
        ("avx512 portable", torch.float16, 0.5, [1], "dense"),
        ("newest avx512 portable", torch.float32, 0.5, [1], "dense"),
        ("portable", torch.float32, 0.1, [1], "dense"),
    ],
)
def test_the_table_decides_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
    sets: str,
    dtype: torch.dtype,
    density: float,
    m_values: list[int],
    choice: str,
) -> None:
    monkeypatch.setattr(dispatch, "load_table", lambda: TABLE)
    monkeypatch.setattr(dispatch, "NODE_SECONDS", 0.0)
    weight = packed(columns=100, density=density, dtype=dtype)
    verdict = judge(weight, m_values=m_values, tuner=MadeUp({}, sets))
    assert (verdict.choice, verdict.source) == (choice, "table")


def test_the_table_expects_less_of_small_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "load_table", lambda: TABLE)

    def found(size: int) -> Verdict:
        return judge(packed(size, size), m_values=[1], tuner=MadeUp({}))

    speeds = [found(size).speedup[1] for size in (32, 256, 1024, 4096)]
    assert speeds == sorted(speeds)
    assert 1.6 < speeds[-1] < 1.7, "the table says 1.7"
    assert (found(32).choice, found(4096).choice) == ("dense", "sparse")


def test_what_was_measured_goes_before_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dispatch, "load_table", lambda: TABLE)
    monkeypatch.setattr(tuning, "UNUSABLE", 1e9)  # This machine may be busy.
    tuner = real_tuner(tmp_path)
    measured = judge(packed(), m_values=[1], source="measure", tuner=tuner)
    again = judge(packed(), m_values=[1], source="table", tuner=tuner)
    assert again == measured
    assert again.source == "measured"


def test_the_table_of_the_package_is_whole() -> None:
    table = load_table()
    for key, by_density in table.cells.items():
        assert key.count("/") == 3
        for by_m in by_density.values():
            assert by_m
            assert all(speedup > 0 for speedup in by_m.values())
    assert not any(key.startswith("portable/") for key in table.cells)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{}")
    with pytest.raises(CompileError, match="damaged"):
        speed_table.load_table(path)


# What is chosen by a hair is measured twice.


class InTurn(MadeUp):
    """Gives the next of some answers each time that it may time something."""

    def __init__(self, *answers: Mapping[int, Measured]) -> None:
        super().__init__({})
        self.rest = list(answers)

    def measure(self, weight: BitmaskWeight, **options: object) -> dict[int, Measured]:  # type: ignore[override]
        self.asked.append(options)
        return dict(self.rest.pop(0))


def once(speedup: float, noise: float = 0.01, times: int = 1, extra: int = 0) -> Measured:
    return Measured({1: speedup}, noise, extra, {}, times)


@pytest.mark.parametrize(
    ("first", "second", "choice", "reason"),
    [
        (once(1.05), None, "sparse", "1.05x at m=1"),  # three errors less is 1.02
        (once(1.02), once(1.01, times=2), "sparse", "1.01x at m=1"),
        (once(1.02), once(0.96, times=2), "dense", "0.96x at m=1"),
        (once(1.02), once(0.99, times=2), "dense", "0.99x on average over m=1"),
        (once(1.4, 0.08), None, "sparse", "1.40x at m=1"),
        (once(1.2, 0.08), once(1.1, 0.02, times=2), "sparse", "1.10x at m=1"),
        (
            once(1.2, 0.2),
            once(1.2, 0.2, times=2),
            "dense",
            "1.20x at m=1, and too noisy to tell: measure again on an idle machine",
        ),
        (once(1.02, times=2), None, "sparse", "1.02x at m=1"),  # it was, by an earlier process
    ],
)
def test_what_noise_could_have_won_is_measured_again(
    first: Measured, second: Measured | None, choice: str, reason: str
) -> None:
    tuner = InTurn({0: first}, *([{0: second}] if second else []))
    verdict = judge(packed(), m_values=[1], source="measure", tuner=tuner)
    assert (verdict.choice, verdict.reason) == (choice, reason)
    assert not tuner.rest
    assert [asked.get("again", False) for asked in tuner.asked] == [False, True][: len(tuner.asked)]


def test_another_layout_gets_its_chance_when_the_first_falls() -> None:
    tuner = InTurn(
        {0: once(1.01), 1: once(1.03, extra=9)}, {0: once(0.9, times=2)}, {1: once(1.02, times=2)}
    )
    verdict = judge(packed(), m_values=[1], source="measure", tuner=tuner)
    assert [asked["layouts"] for asked in tuner.asked] == [(0, 1), [0], [1]]
    assert (verdict.choice, verdict.layout, verdict.speedup) == ("sparse", 1, {1: 1.02})


def test_where_nothing_may_be_timed_a_doubt_is_for_dense() -> None:
    for times, choice in ((1, "dense"), (2, "sparse")):
        tuner = InTurn({0: once(1.01, times=times)})
        verdict = judge(packed(), m_values=[1], source="table", tuner=tuner)
        assert (verdict.choice, verdict.source, len(tuner.asked)) == (choice, "measured", 1)


def test_nothing_that_runs_sparse_was_measured_slower() -> None:
    """Whatever is measured, in whatever order: no chosen one below 0.97, none in unsettled doubt."""
    numbers = random.Random(0)

    def drawn(times: int) -> dict[int, Measured]:
        return {
            layout: Measured(
                {m: numbers.uniform(0.85, 1.25) for m in (1, 16)},
                numbers.choice([0.0, 0.01, 0.05, 0.2]),
                layout,
                {},
                times,
            )
            for layout in (0, 1)
        }

    chosen = 0
    for _ in range(2000):
        tuner = InTurn(drawn(1), *(drawn(2) for _ in range(2)))
        verdict = judge(packed(), m_values=[1, 16], source="measure", tuner=tuner)
        if verdict.choice == "sparse":
            chosen += 1
            lowest = min(verdict.speedup.values())
            assert lowest >= 0.97
            settled = len(tuner.asked) > 1 and verdict.noise <= tuning.UNUSABLE
            assert settled or lowest * (1 - 3 * verdict.noise) >= 1
    assert 100 < chosen < 1900


# PyTorch as the rival.


def test_what_was_not_measured_against_pytorch_stays_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "load_table", lambda: TABLE)
    monkeypatch.setattr(dispatch, "NODE_SECONDS", 0.0)
    tuner = MadeUp({0: seen(1.8)})
    weight = packed(density=0.1)
    assert judge(weight, m_values=[1], tuner=tuner).choice == "sparse"
    verdict = judge(weight, m_values=[1], tuner=tuner, rival=PYTORCH)
    assert (verdict.choice, verdict.rival) == ("dense", "PyTorch")
    assert verdict.reason == "it was never measured against PyTorch on this machine"
    half = judge(weight, m_values=[1], source="measure", tuner=tuner, rival=HALF)
    assert (half.choice, half.rival, half.dense_bytes) == ("sparse", "PyTorch", 64 * 64 * 2)
    assert tuner.asked[-1]["rival"] == HALF


def test_pytorch_is_timed_through_its_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "UNUSABLE", 1e9)  # This machine may be busy.
    tuner = real_tuner(tmp_path)
    called: list[tuple[str, torch.dtype, int]] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "linear" in str(func) or "mm" in str(func):
                called.append((str(func), args[0].dtype, torch.get_num_threads()))
            return func(*args, **(kwargs or {}))

    before = torch.get_num_threads()
    with Counted():
        found = tuner.measure(packed(), m_values=[1, 5], threads=before + 1, rival=HALF)
    assert torch.get_num_threads() == before
    assert found[0].speedup.keys() == {1, 5}
    assert {threads for _, _, threads in called} == {before + 1}
    assert {dtype for _, dtype, _ in called} == {torch.bfloat16}
    assert {name for name, _, _ in called} > {"zeroskip.sparse_linear.default"}

    for other in (PYTORCH, ONNX_RUNTIME):
        options = {"m_values": [1], "threads": before + 1, "only_known": True}
        assert not tuner.measure(packed(), rival=other, **options)  # type: ignore[arg-type]
        assert tuner.measure(packed(), rival=HALF, **options)  # type: ignore[arg-type]


def test_pytorch_runs_on_no_other_library(tmp_path: Path) -> None:
    tuner = real_tuner(tmp_path)
    tuner.instruction_set = "portable"
    with pytest.raises(LoweringError, match="library of this installation"):
        tuner.measure(packed(), m_values=[1], threads=1, rival=PYTORCH)


# What is measured, and kept.


def real_tuner(tmp_path: Path) -> Tuner:
    library = tuning.load_library(library_path())
    return Tuner(library, TuningCache(tmp_path / "tuning.json"), seconds=0.01)


def test_a_measurement_is_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = real_tuner(tmp_path).measure(packed(), m_values=[1, 3], threads=1)
    assert set(first[0].speedup) == {1, 3}
    assert all(0.001 < speedup < 1000 for speedup in first[0].speedup.values())
    # A noisy measurement is taken again: on a busy machine that may be any.
    stored = json.loads((tmp_path / "tuning.json").read_text())
    for cell in stored["cells"].values():
        cell["noise"] = 0.01
    (tmp_path / "tuning.json").write_text(json.dumps(stored))

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning, "compare", never)
    again = real_tuner(tmp_path).measure(packed(), m_values=[1, 3], threads=1)
    assert again[0].speedup == first[0].speedup
    for changed in ({"threads": 2}, {"m_values": [2]}, {"working_set_bytes": 1 << 30}):
        options = {"m_values": [1], "threads": 1, **changed}
        with pytest.raises(AssertionError, match="measured again"):
            real_tuner(tmp_path).measure(packed(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("cpu_name", "Intel(R) Xeon(R) Processor (6/106/6)"),
        ("cpu_instruction_sets", ("avx2", "fma")),
        ("_digest", "0123456789ab"),
    ],
)
def test_another_cpu_or_another_library_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    tuner = real_tuner(tmp_path)
    monkeypatch.setattr(tuning, "UNUSABLE", 1e9)  # This machine may be busy.

    def known() -> bool:
        found = tuner.measure(packed(), m_values=[1], threads=1, layouts=[0], only_known=True)
        return bool(found)

    tuner.measure(packed(), m_values=[1], threads=1, layouts=[0])
    assert known()
    monkeypatch.setattr(tuning, name, lambda *_: other)
    assert not known()


def test_a_noisy_measurement_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noisy(runs: Sequence[object], seconds: float) -> list[list[float]]:
        calls.append(seconds)
        return [[1.0, 3.0, 1.0, 5.0], *([[1.0, 1.0, 1.0, 1.0]] * (len(runs) - 1))]

    monkeypatch.setattr(tuning, "compare", noisy)
    for _ in range(2):
        real_tuner(tmp_path).measure(packed(), m_values=[1], threads=1, layouts=[0])
    assert len(calls) == 2


def planted(monkeypatch: pytest.MonkeyPatch, *speedups: float, noise: float = 0.0) -> list[float]:
    """Makes each comparison come out as the next of these; returns those that are left."""
    left = list(speedups)

    def compare(runs: Sequence[object], seconds: float) -> list[list[float]]:
        speedup = left.pop(0)
        dense = [1.0, 1.0 + 2 * noise, 1.0 - 2 * noise, 1.0]
        return [dense, *([[1 / speedup] * 4] * (len(runs) - 1))]

    monkeypatch.setattr(tuning, "compare", compare)
    return left


def test_a_denser_weight_is_taken_to_be_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = planted(monkeypatch, 1.2, 1.3, 1.1)
    tuner = real_tuner(tmp_path)
    one = {"m_values": [1], "threads": 1, "layouts": [0]}
    first = tuner.measure(packed(columns=100, density=0.48), **one)  # type: ignore[arg-type]
    assert first[0].speedup == pytest.approx({1: 1.2})
    denser = packed(columns=100, density=0.52)
    assert tuner.measure(denser, **one)[0].speedup == pytest.approx({1: 1.2 * 48 / 52})  # type: ignore[arg-type]
    sparser = packed(columns=100, density=0.48)
    assert tuner.measure(sparser, **one)[0].speedup == pytest.approx({1: 1.2})  # type: ignore[arg-type]
    assert len(left) == 2
    # Measured itself, the slower result counts, for both densities; by other processes, too.
    faster = tuner.measure(denser, again=True, **one)[0]  # type: ignore[arg-type]
    assert (faster.speedup[1], faster.times) == (pytest.approx(1.2), 2)
    slower = real_tuner(tmp_path).measure(denser, again=True, **one)[0]  # type: ignore[arg-type]
    assert (slower.speedup[1], slower.times) == (pytest.approx(1.1), 3)


def test_a_noisy_measurement_serves_the_linears_that_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, 3.0, noise=0.5)
    tuner = real_tuner(tmp_path)
    for _ in range(3):
        found = tuner.measure(packed(), m_values=[1], threads=1, layouts=[0])
        assert found[0].noise > tuning.UNUSABLE


def test_threads_and_repacked_layouts_are_measured(tmp_path: Path) -> None:
    found = real_tuner(tmp_path).measure(
        packed(300, 200, 0.3), m_values=[1, 64], threads=2, working_set_bytes=1 << 20
    )
    assert 0 in found
    for layout, measured in found.items():
        assert set(measured.kernels) == {1, 64}
        assert layout == 0 or measured.kernels != found[0].kernels


def test_turns_are_taken_and_a_hopeless_candidate_drops_out() -> None:
    order = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    times = timing.compare(
        [lambda: run("dense", 1.0), lambda: run("good", 0.5), lambda: run("bad", 2.5)], 0.0
    )
    all_of_them, fit = ["dense", "good", "bad"], ["dense", "good"]
    assert order == all_of_them * 4 + fit * 2  # the first call of each only warms up
    assert times == [[1.0] * 5, [0.5] * 5, [2.5] * 3]


def test_one_slow_call_does_not_drop_a_candidate() -> None:
    slow_once = iter([9.0, 9.0, *[0.5] * 20])
    times = timing.compare([lambda: 1.0, lambda: next(slow_once)], 0.0)
    assert times[1][1:] == [0.5] * 4


def test_noise_is_that_of_the_ratio() -> None:
    steady = timing.standard_error([1.0, 2.0, 4.0], [0.5, 1.0, 2.0])
    assert steady == 0.0  # both became slower alike
    assert timing.standard_error([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]) > 0.2


def test_the_cache_round_trip(tmp_path: Path) -> None:
    cell = {"dense_seconds": 2.0, "sparse_seconds": 1.0, "noise": 0.01}
    TuningCache(tmp_path / "deep" / "a.json").put({"here": cell})
    read = TuningCache(tmp_path / "deep" / "a.json")
    assert read.get("here") == cell
    assert read.get("there") is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"format": 1, "cells": []}', b'{"format": 1}', b"null"],
)
def test_a_corrupt_cache_is_written_anew(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    cell = {"dense_seconds": 2.0, "sparse_seconds": 1.0, "noise": 0.01}
    with caplog.at_level(logging.WARNING, "zeroskip"):
        cache = TuningCache(path)
        assert cache.get("x") is None
        cache.put({"x": cell})
    assert "cannot be read" in caplog.text
    assert TuningCache(path).get("x") == cell


@pytest.mark.parametrize(
    "cell", [{}, [], {"dense_seconds": 0.0, "sparse_seconds": 1.0, "noise": 0.0}, {"noise": "x"}]
)
def test_a_damaged_measurement_counts_as_none(tmp_path: Path, cell: object) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"format": 1, "cells": {"x": cell}}))
    assert TuningCache(path).get("x") is None


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def write(number: int) -> None:
        for turn in range(10):
            cell = {"dense_seconds": 1.0 + number, "sparse_seconds": 1.0, "noise": 0.0}
            TuningCache(path).put({f"{number}/{turn}": cell})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cells = json.loads(path.read_text())["cells"]
    assert any(f"{n}/9" in cells for n in range(4))
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_later_writers_keep_what_others_added(tmp_path: Path) -> None:
    cell = {"dense_seconds": 2.0, "sparse_seconds": 1.0, "noise": 0.01}
    mine, theirs = TuningCache(tmp_path / "a.json"), TuningCache(tmp_path / "a.json")
    assert mine.get("x") is None
    theirs.put({"theirs": cell})
    mine.put({"mine": cell})
    assert TuningCache(tmp_path / "a.json").get("theirs") == cell


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cell = {"dense_seconds": 2.0, "sparse_seconds": 1.0, "noise": 0.01}
    cache = TuningCache(tmp_path / "file" / "a.json")
    cache.put({"x": cell})
    assert "cannot be kept" in caplog.text
    assert cache.get("x") == cell


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_the_cache_is_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROSKIP_CACHE", str(tmp_path))
    assert tuning_file() == tmp_path / "tuning.json"
