"""DeepSparse as a rival: it takes its turns like the others, but in another interpreter."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from zeroskip.runtime.bench import BenchmarkError, Sample

WORKER = Path(__file__).with_name("deepsparse_worker.py")


class DeepSparse:
    """A model opened in DeepSparse; a call runs it once. To be closed.

    Its licence allows evaluation only, so it is no dependency: the interpreter is one in which the
    user installed it (`pip install deepsparse==1.8.0 "numpy<2"`, Python 3.8 to 3.11).

    Args:
        python: That interpreter.
        model: An ONNX file of opset 13 with fixed shapes.
        x: Its one input.
        cores: How many it may use.

    Raises:
        BenchmarkError: It did not start.
    """

    def __init__(self, python: Path, model: Path, x: np.ndarray, cores: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        inputs = Path(self._folder.name) / "x.npy"
        np.save(inputs, x)
        self._process = subprocess.Popen(
            [python, WORKER, model, inputs, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What it says about itself goes to the error stream; analytics need a network.
            env={**os.environ, "NM_DISABLE_ANALYTICS": "1"},
            text=True,
        )
        if not self._answer("ready"):
            raise BenchmarkError(
                "DeepSparse did not start",
                where=str(python),
                next_step="import deepsparse in that interpreter",
            )

    def __call__(self) -> Sample:
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        words = self._answer("").split()
        if len(words) != 2:
            raise BenchmarkError("DeepSparse ended", next_step="see its messages above")
        wall, cpu = map(float, words)
        return Sample(wall, cpu, cpu)

    def close(self) -> None:
        """Ends the interpreter."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _answer(self, wanted: str) -> str:
        """The next line that is an answer; DeepSparse prints a banner of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = line.split()
            if (line.strip() == wanted) if wanted else (len(words) == 2 and "." in words[0]):
                return line.strip()
        return ""
