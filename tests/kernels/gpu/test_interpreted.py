"""Runs the kernels on the CPU, in Triton's interpreter, each in a process that starts with it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
KERNELS = ("gemv24", "gemm24", "decompress24", "masked_gemm", "bitmap_gemv", "split_sum")


def run_interpreted(file: str, *options: str) -> None:
    """Runs a file of tests/kernels/gpu/interpreted; its report is that of the failure."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # No conftest: those of the suite capture models.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    path = f"tests/kernels/gpu/interpreted/{file}"
    done = subprocess.run(
        [*command, path, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_in_the_interpreter(kernel: str) -> None:
    run_interpreted("test_kernels.py", "-k", kernel)


def test_the_repaired_interpreter_computes_as_torch_does() -> None:
    run_interpreted("test_interpreter.py")
