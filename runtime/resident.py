"""The memory and the load time of an ONNX model, taken in a process that does nothing else.

The process runs this very file, by its path, and imports only NumPy and ONNX Runtime: whatever else
a benchmark imports is not memory of the model. Linux only: it reads /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Residence:
    """What a model took; sizes in bytes.

    Args:
        imports: In memory before the model was opened: Python, NumPy, ONNX Runtime.
        resident: In memory after a run, `imports` included.
        anonymous: The part that belongs to the process alone.
        file_backed: The part that is a mapped file; processes share it, and it can be dropped.
        peak_load: The most that was ever in memory when the model was open.
        peak: The most that was ever in memory after the run.
        load_seconds: To open the model; its files were in the page cache or not, as they were.
        first_run_seconds: The first run.
    """

    imports: int
    resident: int
    anonymous: int
    file_backed: int
    peak_load: int
    peak: int
    load_seconds: float
    first_run_seconds: float


def measure_residence(
    model: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    libraries: Sequence[Path] = (),
) -> Residence:
    """Opens a model in a new process and runs it once.

    Args:
        model: An ONNX file.
        feeds: Its inputs by name.
        threads: Threads within an operator.
        libraries: Of custom operators.

    Raises:
        BenchmarkError: The process failed; the message is what it said last.
    """
    import numpy as np

    from zeroskip.runtime.bench import BenchmarkError

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **dict(feeds))  # type: ignore[arg-type]  # its stub takes a flag by keyword
        request = {
            "model": os.fspath(model.absolute()),
            "inputs": os.fspath(inputs),
            "threads": threads,
            "libraries": [os.fspath(library) for library in libraries],
        }
        command = [sys.executable, __file__, json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(
            f"the process that runs the model ended with code {done.returncode}: "
            + " ".join(done.stderr.split())[-400:],
            where=str(model),
            next_step="open the model with ONNX Runtime yourself",
        )
    return Residence(**json.loads(done.stdout.splitlines()[-1]))


def _measure(request: dict[str, Any]) -> dict[str, float]:
    """Runs in the new process."""
    import numpy as np
    import onnxruntime

    # An npz member is read where it is used: nothing of the inputs counts twice.
    with np.load(request["inputs"]) as archive:
        feeds = {name: archive[name] for name in archive.files}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.log_severity_level = 3
    for library in request["libraries"]:
        options.register_custom_ops_library(library)
    imports = _memory("/proc/self/smaps_rollup", "Rss")
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(
        request["model"], options, providers=["CPUExecutionProvider"]
    )
    load_seconds = time.perf_counter() - started
    peak_load = _memory("/proc/self/status", "VmHWM")
    started = time.perf_counter()
    session.run(None, feeds)
    first_run_seconds = time.perf_counter() - started
    resident = _memory("/proc/self/smaps_rollup", "Rss")
    anonymous = _memory("/proc/self/smaps_rollup", "Anonymous")
    return {
        "imports": imports,
        "resident": resident,
        "anonymous": anonymous,
        "file_backed": resident - anonymous,
        "peak_load": peak_load,
        "peak": _memory("/proc/self/status", "VmHWM"),
        "load_seconds": load_seconds,
        "first_run_seconds": first_run_seconds,
    }


def _memory(path: str, key: str) -> int:
    """A line such as `Rss:  1234 kB`, in bytes."""
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    # The folder of this file holds a package called onnx, which is not the one ONNX Runtime means.
    sys.path.pop(0)
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
