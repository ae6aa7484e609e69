"""Times chains of dense linears in ONNX Runtime, and compares what takes turns with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from zeroskip.runtime.bench import paired_ratios, take_turns

HOPELESS = 2.0
"""A candidate this much slower than dense is not timed any further."""
SETTLING = 3
STABLE = 0.01


class DenseChain:
    """Dense products of one input with one weight after another, in one ONNX Runtime session.

    Args:
        rows: out_features.
        columns: in_features.
        copies: How many weights there are.
        threads: Threads within an operator.
    """

    def __init__(self, rows: int, columns: int, copies: int, threads: int) -> None:
        self.copies = copies
        self._clock = clock(threads)
        block = np.random.default_rng(0).standard_normal(65521, dtype=np.float32)
        array = np.resize(block, (columns, rows))
        names = [f"W{i}" for i in range(copies)]
        nodes, outputs, weights = [], [], []
        for i, name in enumerate(names):
            # Only a row leaves the graph, so that the products share a buffer as in a model.
            nodes.append(helper.make_node("MatMul", ["X", name], [f"Y{i}"]))
            nodes.append(helper.make_node("Gather", [f"Y{i}", "zero"], [f"Z{i}"]))
            outputs.append(helper.make_tensor_value_info(f"Z{i}", 1, [rows]))
            stored = onnx.TensorProto(name=name, data_type=1, dims=[columns, rows])
            stored.data_location = onnx.TensorProto.EXTERNAL
            stored.external_data.add(key="location", value="memory")
            weights.append(stored)
        zero = helper.make_tensor("zero", onnx.TensorProto.INT64, [], [0])
        x = helper.make_tensor_value_info("X", 1, ["m", columns])
        graph = helper.make_graph(nodes, "chain", [x], outputs, [*weights, zero])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Its threads must not be spinning while the other side is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # ONNX Runtime recognises equal weights and packs them once: none may equal another.
        self._arrays = [array.copy() for _ in names]
        for i, each in enumerate(self._arrays):
            each[0, 0] = i
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(each) for each in self._arrays]
        options.add_external_initializers(names, values)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def seconds(self, x: torch.Tensor) -> float:
        """Runs all on x, float32 [m, columns]; returns the time of one."""
        array = x.numpy()
        begin = self._clock()
        self._session.run(None, {"X": array})
        return (self._clock() - begin) / self.copies


def compare(runs: Sequence[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Calls functions in turn until the first one's ratios to the others are known well enough.

    Args:
        runs: Each returns its own time; the first is the baseline.
        seconds: About how long it may take; every run is made at least five times, but for those
            that are so slow that three calls settle it.

    Returns:
        The times of each, without the first call, which warms up.
    """

    def next_round(times: Sequence[Sequence[float]], elapsed: float) -> Sequence[int]:
        dense = times[0]
        if len(dense) < SETTLING:
            return range(len(times))
        # One call can be slow by accident, the fastest of three is not.
        limit = HOPELESS * min(dense[:SETTLING])
        live = [i for i, own in enumerate(times) if i == 0 or min(own[:SETTLING]) <= limit]
        late = len(dense) >= 5 and elapsed >= seconds
        known = len(dense) >= 9 and all(standard_error(dense, times[i]) < STABLE for i in live[1:])
        return () if late or known else live

    for run in runs:
        run()
    return take_turns(runs, next_round)


def standard_error(dense: Sequence[float], sparse: Sequence[float]) -> float:
    """Returns the relative standard error of a ratio of medians, from its rounds; 0 of one round."""
    ratios = paired_ratios(dense, sparse)
    if len(ratios) < 2:
        return 0.0
    middle = statistics.median(ratios)
    spread = 1.4826 * statistics.median([abs(ratio - middle) for ratio in ratios])
    return float(1.2533 * spread / middle / len(ratios) ** 0.5)


def clock(threads: int) -> Callable[[], float]:
    """Returns the clock for work on so many threads: of CPU time where one thread does it all."""
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if threads == 1 and fine else time.perf_counter
