"""Opens models in ONNX Runtime for timing: bound inputs and outputs, one thread pool for the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from zeroskip.runtime.onnx.custom_ops import session_options


def share_threads(threads: int) -> None:
    """Makes the thread pool of all sessions to come, once in a process, before the first session.

    With a pool for each session, the spinning threads of one candidate take the core that the next
    one is timed on.
    """
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def shared_options() -> onnxruntime.SessionOptions:
    """Options of a session that uses the pool of the process."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


def open_session(
    model: onnx.ModelProto | bytes | Path, *, sparse: bool = False
) -> onnxruntime.InferenceSession:
    """Opens a model; `sparse` registers our operator."""
    options = shared_options()
    if sparse:
        session_options(options)
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def bound_run(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> Callable[[], object]:
    """Returns what runs the session on these inputs, with outputs that are allocated once."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    results = session.run(None, dict(feeds))
    for value, array in zip(session.get_outputs(), results, strict=True):
        binding.bind_ortvalue_output(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return lambda: session.run_with_iobinding(binding)
