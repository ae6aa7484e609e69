"""Paired timing: candidates take turns in one process, and ratios are taken within each round.

Machines drift: clocks change, neighbours come and go. Two numbers taken minutes apart say little; two
taken milliseconds apart, over and over, say which is faster. So every round runs every candidate,
each second round backwards, the ratio to the baseline is formed within the round, and medians count.
A result also says what disturbed it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from zeroskip.ir.errors import CompileError

Clock = Literal["wall", "thread", "process"]
T = TypeVar("T")

# Beyond these a result is called noisy.
OTHERS_LIMIT = 0.15  # cores that other processes used meanwhile
SPREAD_LIMIT = 0.10  # interquartile range of the baseline, of its median
DRIFT_LIMIT = 0.05  # change of the baseline's median from the first half to the second
WAITING_LIMIT = 0.05  # time in which a single thread did not get its core


class BenchmarkError(CompileError):
    """A measurement cannot be made."""


@dataclass(frozen=True)
class Sample:
    """The seconds of one call.

    Args:
        wall: Time that passed.
        thread: CPU time of the calling thread.
        process: CPU time of all threads of the process, those included that spin for work.
    """

    wall: float
    thread: float
    process: float


# A candidate may return a Sample that was taken elsewhere, such as in another interpreter.
Candidate = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and the quartiles around it."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """The interquartile range, as a part of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Args:
        wall: Seconds of a call.
        thread: CPU seconds of the calling thread.
        process: CPU seconds of the process.
        speedup: The baseline's time over this one's, within each round, by the chosen clock.
        wall_speedup: The same by wall time.
    """

    wall: Spread
    thread: Spread
    process: Spread
    speedup: Spread
    wall_speedup: Spread


@dataclass(frozen=True)
class Noise:
    """What disturbed a measurement.

    Args:
        load_average: Of the last minute, this process included.
        others: Cores that other processes used meanwhile; None where the system does not tell.
        spread: Interquartile range of the baseline, as a part of its median.
        drift: Change of the baseline's median from the first half of the rounds to the second.
        waiting: Part of the time in which the calling thread did not run; None unless timed by it.
    """

    load_average: float
    others: float | None
    spread: float
    drift: float
    waiting: float | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what was beyond its limit."""
        found = []
        if self.others is not None and self.others > OTHERS_LIMIT:
            found.append(f"other processes used {self.others:.1f} cores")
        if self.spread > SPREAD_LIMIT:
            found.append(f"half of the baseline's times are spread over {self.spread:.0%}")
        if self.drift > DRIFT_LIMIT:
            found.append(f"the baseline's time changed by {self.drift:.0%} meanwhile")
        if self.waiting is not None and self.waiting > WAITING_LIMIT:
            found.append(f"the thread waited for its core {self.waiting:.0%} of the time")
        return tuple(found)


@dataclass(frozen=True)
class Comparison:
    """The timings of all candidates by name, and how far they can be trusted."""

    baseline: str
    clock: Clock
    rounds: int
    timings: Mapping[str, Timing]
    noise: Noise

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dictionaries for JSON, the warnings included."""
        return {**asdict(self), "warnings": list(self.noise.warnings)}


def compare(
    candidates: Mapping[str, Candidate],
    baseline: str,
    *,
    rounds: int = 15,
    seconds: float | None = None,
    min_rounds: int = 5,
    warm_up: int = 2,
    calls: int = 1,
    settle: int = 0,
    pause: float = 0.0,
    clock: Clock = "wall",
) -> Comparison:
    """Times candidates in turns.

    Args:
        candidates: Name to what is called; whatever it returns is ignored, unless it is a Sample.
        baseline: The candidate that ratios refer to.
        rounds: How often each candidate has its turn.
        seconds: Stop after the round that ends later than this, but not before `min_rounds`.
        min_rounds: See `seconds`.
        warm_up: Rounds that are not counted.
        calls: Timed calls in a turn; the turn counts as their mean.
        settle: Calls before them that are not timed: they bring back what the other candidates
            pushed out of the caches, which flatters, and wake threads up, which does not.
        pause: Seconds of sleep before a turn, in which spinning threads of others go to sleep.
        clock: What speed-ups are measured with. CPU time of the thread hides the neighbours, but
            is right only where nothing runs on other threads.

    Raises:
        BenchmarkError: There is no such baseline, or nothing to measure.
    """
    if baseline not in candidates:
        raise BenchmarkError(
            f"the baseline {baseline!r} is not among the candidates",
            next_step=f"one of {', '.join(candidates) or 'none'}",
        )
    if min(rounds, min_rounds, calls) < 1:
        raise BenchmarkError("no rounds to measure", next_step="ask for at least one")
    everyone = range(len(candidates))

    def next_round(done: Sequence[Sequence[Sample]], elapsed: float) -> Sequence[int]:
        count = len(done[0])
        late = seconds is not None and elapsed > seconds and count >= min_rounds
        if late or count == rounds:
            return ()
        return everyone if count % 2 == 0 else everyone[::-1]

    turns = [partial(_turn, each, calls, settle, pause) for each in candidates.values()]
    for turn in turns * warm_up:
        turn()
    usage = _Usage()
    taken = take_turns(turns, next_round)
    others = usage.others()
    samples = dict(zip(candidates, taken, strict=True))
    base = samples[baseline]
    return Comparison(
        baseline,
        clock,
        len(base),
        {name: _timing(own, base, clock) for name, own in samples.items()},
        _noise(base, clock, others),
    )


def take_turns(
    turns: Sequence[Callable[[], T]],
    next_round: Callable[[Sequence[Sequence[T]], float], Sequence[int]],
) -> list[list[T]]:
    """Calls functions round by round; returns what the calls of each gave.

    Args:
        turns: Functions; each call is a turn.
        next_round: Is given what the calls of each gave so far and the seconds since the first
            round; returns which of them have a turn now, in order. An empty answer ends it.
    """
    results: list[list[T]] = [[] for _ in turns]
    started = time.perf_counter()
    while places := next_round(results, time.perf_counter() - started):
        for place in places:
            results[place].append(turns[place]())
    return results


def paired_ratios(base: Sequence[float], times: Sequence[float]) -> list[float]:
    """Returns how many times as long the baseline took, in each round that both took part in."""
    # A clock that did not advance would divide by zero; then nothing was measured either.
    return [max(b, 1e-9) / max(own, 1e-9) for b, own in zip(base, times, strict=False)]


def median_spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of at least one number."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def _turn(candidate: Candidate, calls: int, settle: int, pause: float) -> Sample:
    if pause:
        time.sleep(pause)
    for _ in range(settle):
        candidate()
    elsewhere = []
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    for _ in range(calls):
        result = candidate()
        if isinstance(result, Sample):
            elsewhere.append(result)
    process, thread = time.process_time() - process, time.thread_time() - thread
    wall = time.perf_counter() - wall
    if elsewhere:
        wall = sum(sample.wall for sample in elsewhere)
        thread = sum(sample.thread for sample in elsewhere)
        process = sum(sample.process for sample in elsewhere)
    return Sample(wall / calls, thread / calls, process / calls)


def _timing(samples: Sequence[Sample], base: Sequence[Sample], clock: Clock) -> Timing:
    def spread(clock: Clock) -> Spread:
        return median_spread(_seconds(samples, clock))

    def ratios(clock: Clock) -> Spread:
        return median_spread(paired_ratios(_seconds(base, clock), _seconds(samples, clock)))

    return Timing(
        spread("wall"), spread("thread"), spread("process"), ratios(clock), ratios("wall")
    )


def _seconds(samples: Sequence[Sample], clock: Clock) -> list[float]:
    return [getattr(sample, clock) for sample in samples]


def _noise(base: Sequence[Sample], clock: Clock, others: float | None) -> Noise:
    times = _seconds(base, clock)
    half = len(times) // 2
    first, second = times[:half], times[half:]
    drift = abs(statistics.median(second) / statistics.median(first) - 1) if half >= 2 else 0.0
    waiting = None
    if clock == "thread":
        waiting = statistics.median([1 - sample.thread / sample.wall for sample in base])
    spread = median_spread(times).relative
    return Noise(os.getloadavg()[0], others, spread, drift, waiting)


class _Usage:
    """How busy all cores are besides this process and its children, from when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def others(self) -> float | None:
        busy, elapsed = _busy_seconds(), time.perf_counter() - self._started
        # The kernel counts in steps of 10 ms: nothing to be said about a shorter time.
        if busy is None or self._busy is None or elapsed < 0.1:
            return None
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / elapsed)


def _busy_seconds() -> float | None:
    """CPU seconds of all cores since the system started; None where it does not tell."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupt, soft, steal = map(int, first.split()[1:9])
    ticks = user + nice + system + interrupt + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and of its children, the running ones included."""
    own = sum(os.times()[:4])
    try:
        tasks = Path("/proc/self/task").iterdir()
        children = {pid for task in tasks for pid in (task / "children").read_text().split()}
        for pid in children:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        pass  # A child that ended meanwhile is counted by os.times.
    return own
