"""Times of kernels on a CUDA device: graphs over rotating operands, medians of replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

CACHES = 3
"""Operands together are this many times the L2 cache, or they would be read from it."""


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """Returns how many copies of operands of this size rotate so that none is found in the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHES * cache // max(1, nbytes)))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Returns a graph of one call of each; each runs once before, so that nothing is compiled in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Returns the microseconds of one replay."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def time_call(calls: Sequence[Callable[[], object]], repeats: int = 9) -> float:
    """Returns the microseconds of one call: the median of replays of a graph of all.

    Args:
        calls: The same product over operands that rotate; see `copies_beyond_cache`.
        repeats: Replays.
    """
    graph = capture(calls)
    replay(graph)
    return median(replay(graph) for _ in range(repeats)) / len(calls)


def time_pair(
    first: Sequence[Callable[[], object]],
    second: Sequence[Callable[[], object]],
    repeats: int = 15,
) -> tuple[float, float]:
    """Returns the microseconds of one call of two rivals, their replays taken in turn."""
    graphs = [(capture(calls), len(calls)) for calls in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for (graph, count), found in zip(graphs, times, strict=True):
            found.append(replay(graph) / count)
    # The first replay of each loads the graph.
    return median(times[0][1:]), median(times[1][1:])
