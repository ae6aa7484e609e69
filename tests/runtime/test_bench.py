"""The measuring core: order, medians, ratios within a round, noise, and memory of a process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zeroskip.runtime.bench import (
    BenchmarkError,
    Sample,
    compare,
    median_spread,
    paired_ratios,
    take_turns,
)
from zeroskip.runtime.resident import measure_residence


def scripted(*walls: float) -> Callable[[], Sample]:
    """A candidate that says what it took, over and over."""
    samples: Iterator[Sample] = cycle([Sample(wall, wall / 2, wall * 2) for wall in walls])
    return lambda: next(samples)


def test_candidates_take_turns_and_every_second_round_runs_backwards() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    compare(calls, "a", rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"


def test_a_turn_has_calls_that_count_and_calls_that_do_not() -> None:
    # Each turn is settle, call, call: only the last two of every three count.
    result = compare({"a": scripted(100, 1, 3)}, "a", rounds=4, warm_up=2, settle=1, calls=2)
    assert result.timings["a"].wall.median == 2


def test_ratios_are_formed_within_a_round() -> None:
    # The machine slows down tenfold half way; the ratio of each round is still 2, and that of the
    # medians of two candidates that were timed one after the other would not be.
    result = compare(
        {"dense": scripted(2, 2, 2, 20, 20, 20), "sparse": scripted(1, 1, 1, 10, 10, 10)},
        "dense",
        rounds=6,
        warm_up=0,
    )
    speedup = result.timings["sparse"].speedup
    assert (speedup.low, speedup.median, speedup.high) == (2, 2, 2)
    assert result.timings["dense"].speedup.median == 1
    assert result.noise.drift == pytest.approx(9)
    assert any("changed by 900%" in warning for warning in result.noise.warnings)


def test_one_slow_round_does_not_move_a_median() -> None:
    result = compare(
        {"dense": scripted(2), "sparse": scripted(1, 1, 50, 1, 1)}, "dense", rounds=5, warm_up=0
    )
    assert result.timings["sparse"].speedup.median == 2
    assert result.timings["sparse"].wall.median == 1


def test_the_clock_decides_which_time_counts() -> None:
    candidates = {"a": lambda: Sample(4, 6, 8), "b": lambda: Sample(2, 1, 8)}
    ratio = {
        clock: compare(candidates, "a", rounds=2, clock=clock).timings["b"].speedup.median
        for clock in ("wall", "thread", "process")
    }
    assert ratio == {"wall": 2, "thread": 6, "process": 1}
    assert compare(candidates, "a", clock="thread").timings["b"].wall_speedup.median == 2


def test_a_spread_of_the_baseline_is_a_warning() -> None:
    noisy = compare({"a": scripted(1, 2, 3, 2)}, "a", rounds=8, warm_up=0)
    assert noisy.noise.spread > 0.1
    assert any("spread" in warning for warning in noisy.noise.warnings)
    assert "warnings" in noisy.to_dict()
    calm = compare({"a": scripted(1)}, "a", rounds=8, warm_up=0)
    assert calm.noise.spread == calm.noise.drift == 0


def test_a_thread_that_waits_for_its_core_is_a_warning() -> None:
    result = compare({"a": lambda: Sample(2, 1, 1)}, "a", rounds=4, clock="thread")
    assert result.noise.waiting == 0.5
    assert any("waited for its core 50%" in warning for warning in result.noise.warnings)
    assert compare({"a": lambda: Sample(2, 1, 1)}, "a", rounds=4).noise.waiting is None


def test_time_is_up_after_the_least_number_of_rounds() -> None:
    result = compare({"a": lambda: time.sleep(0.01)}, "a", rounds=1000, seconds=0.03, min_rounds=5)
    assert 5 <= result.rounds < 100


def test_real_work_is_timed_by_cpu_time() -> None:
    def work(count: int) -> Callable[[], object]:
        return lambda: sum(range(count))

    result = compare({"long": work(400_000), "short": work(100_000)}, "long", clock="thread")
    # Four times the work; wide enough for any machine, and wrong if a clock or a ratio is.
    assert 2.5 < result.timings["short"].speedup.median < 6
    assert result.timings["long"].process.median >= result.timings["long"].thread.median * 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "b"}, "not among the candidates"),
        ({"baseline": "a", "rounds": 0}, "no rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        compare({"a": lambda: None}, **arguments)  # type: ignore[arg-type]


def test_a_plan_says_who_has_a_turn_and_when_it_ends() -> None:
    order: list[str] = []

    def turn(name: str) -> Callable[[], str]:
        return lambda: order.append(name) or name  # type: ignore[func-returns-value]

    def next_round(done: Sequence[Sequence[str]], elapsed: float) -> Sequence[int]:
        assert elapsed >= 0
        return {0: (0, 1, 2), 1: (2, 0)}.get(len(done[0]), ())

    taken = take_turns([turn(name) for name in "abc"], next_round)
    assert "".join(order) == "abc" + "ca"
    assert taken == [["a", "a"], ["b"], ["c", "c"]]


def test_ratios_are_those_of_shared_rounds() -> None:
    assert paired_ratios([2.0, 3.0, 8.0], [1.0, 6.0]) == [2.0, 0.5]
    assert paired_ratios([0.0], [0.0]) == [1.0]  # the clock stood still


def test_quartiles() -> None:
    spread = median_spread([1, 2, 3, 4, 5])
    assert (spread.low, spread.median, spread.high, spread.relative) == (2, 3, 4, 2 / 3)
    assert median_spread([7]).relative == 0


def one_linear(path: Path, size: int) -> Path:
    weight = np.zeros((size, size), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", size])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_model_is_that_of_its_weights(tmp_path: Path) -> None:
    sizes = {size: 4 * size * size for size in (64, 2048)}
    taken = {
        size: measure_residence(
            one_linear(tmp_path / f"{size}.onnx", size), {"x": np.ones((1, size), np.float32)}
        )
        for size in sizes
    }
    small, large = taken.values()
    growth = large.resident - small.resident
    # 16 MiB of weights: once, or twice while a packed form stands beside the first.
    assert 0.9 * sizes[2048] < growth < 3 * sizes[2048]
    for residence in taken.values():
        assert residence.anonymous + residence.file_backed == residence.resident
        assert residence.peak >= residence.peak_load > residence.imports > 10 * 2**20
        assert residence.load_seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_does_not_open_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(BenchmarkError, match=r"ended with code 1.*[Pp]rotobuf") as raised:
        measure_residence(broken, {})
    assert str(broken) in str(raised.value)
