"""benchmarks/without_amx.py: the command runs, and the system refuses it AMX."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from zeroskip.runtime.kernels.location import try_library_path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "without_amx.py"
TIMEOUT = 120  # seconds

# Asks for AMX as a library does, before and after zeroskip's library has.
CHILD = """
import ctypes, json, sys
system = ctypes.CDLL(None, use_errno=True)
system.syscall.restype = ctypes.c_long
def ask():
    ctypes.set_errno(0)
    answer = system.syscall(ctypes.c_long(158), ctypes.c_long(0x1023), ctypes.c_long(18))
    return [answer, ctypes.get_errno()]
answers = [ask()]
library = ctypes.CDLL(sys.argv[1])
library.zs_instruction_sets.restype = ctypes.c_char_p
sets = library.zs_instruction_sets().decode().split()
print(json.dumps({"answers": answers + [ask()], "sets": sets}))
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64"
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *command], capture_output=True, text=True, timeout=TIMEOUT
    )


def test_the_request_is_refused_and_the_library_has_no_amx() -> None:
    library = try_library_path()
    if library is None:
        pytest.skip("no library of kernels")
    done = run(sys.executable, "-c", CHILD, str(library))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    eperm = 1
    assert said["answers"] == [[-1, eperm], [-1, eperm]]
    assert "amx" not in said["sets"]
    assert said["sets"][-1] == "portable"


def test_what_the_command_starts_is_refused_too() -> None:
    child = CHILD.partition("library =")[0] + "\nprint(json.dumps(answers))"
    outer = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    done = run(sys.executable, "-c", outer, child)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[-1, 1]]


def test_the_command_keeps_its_exit_status() -> None:
    assert run(sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_a_command_that_is_not_there() -> None:
    done = run("no-such-command-here")
    assert done.returncode == 1
    assert done.stderr.startswith("cannot run no-such-command-here: ")


def test_no_command() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("usage: ")
