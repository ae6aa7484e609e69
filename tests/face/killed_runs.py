"""A process that has imported everything, forks one child for each compilation, and kills some.

Reads one JSON object a line from standard input, answers with one a line. The model is captured and
its graph translated to ONNX once, here: children begin with the passes, which is where stages are
finished and files are written, and most moments of an export are those in which it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def prepare(model: Path, text: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch

    # What a child would import anew each time.
    import zeroskip.compile_job
    import zeroskip.runtime.onnx.export
    from tests.kept_traces import keep_translations
    from zeroskip.calibration import calibration_from_text
    from zeroskip.compile_key import code_digest
    from zeroskip.ir.program import Batch, Program
    from zeroskip.models import load_tokenizer
    from zeroskip.runtime.onnx import translate

    torch.set_num_threads(1)  # No threads, so that a fork is a whole process.
    code_digest()
    batches = calibration_from_text(text, load_tokenizer(model), samples=4, sequence_length=16)
    program = zeroskip.compile_job.open_program(model, None, batches)

    def captured(_model: Path, _examples: None, batches: list[Batch]) -> Program:
        return replace(program, calibration=batches)

    zeroskip.compile_job.open_program = captured
    translate._standard_operators = keep_translations()
    with tempfile.TemporaryDirectory() as folder:
        zeroskip.runtime.onnx.export.export_onnx(
            Path(folder) / "onnx",
            weights=program.weights,
            reference=None,
            graph_module=program.module(),
            example_inputs=program.example_inputs,
            output_names=program.outputs,
            form="plain",
        )


def compile_and_exit(request: dict[str, Any]) -> None:
    from zeroskip.cli import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        main(request["arguments"])
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a compilation; kills it `delay` seconds after something is there in the folder `after`."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        compile_and_exit(request)
    deadline: float | None = None
    status = 0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is None and (not request["after"] or list(Path(request["after"]).glob("0*"))):
            deadline = time.perf_counter() + request["delay"]
        if deadline is not None and time.perf_counter() >= deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.004)
    killed = os.WIFSIGNALED(status)
    return {
        "killed": killed,
        "code": None if killed else os.WEXITSTATUS(status),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
    os._exit(0)  # There is nothing to put in order, and it takes seconds.
