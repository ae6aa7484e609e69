"""The kernels under sanitizers and, for 64-bit ARM, under an emulator.

Each test builds sources and a driver as one program: tests/kernels/cpp/check_kernels.cpp compares
every kernel with a product in double, in memory of exactly the size that the interface asks for.
`python -m tests.kernels.fuzz` looks for inputs that none of these tests has thought of.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.kernels.programs import compile_kernels, link_driver, run, runs
from zeroskip.runtime.kernels import compilers

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Checks of every pointer that an intrinsic takes make compilation three times as long; what they
# would find lies in the other sources, which have them all, or shows as a wrong address.
INTRINSICS = ("-fno-sanitize=null,alignment,object-size,pointer-overflow",)
# GCC: calls instead of inline checks of addresses compile four times as fast.
SHORT = ("--param", "asan-instrumentation-with-call-threshold=0")
THREAD = ("-fsanitize=thread", "-O1")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sanitizers need GCC or clang")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler of this machine whose programs run with every sanitizer."""
    found = compilers.find_compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "main.cpp", folder / "main"
    source.write_text("int main() { return 0; }\n")
    for flags in (ADDRESS, THREAD):
        command = [*found.command, *flags, str(source), "-o", str(program)]
        if not runs(command) or not runs([str(program)]):
            pytest.skip(f"the compiler or this system has no {flags[0]}")
    return found.command[0]


def test_address_and_undefined_behaviour(tmp_path: Path, compiler: str) -> None:
    """All kernels; then the libFuzzer target as a plain program, over inputs from a fixed seed."""
    probe = [compiler, *SHORT, "-fsanitize=address", "-x", "c++", "-fsyntax-only", os.devnull]
    flags = (*ADDRESS, "-O1", *(SHORT if runs(probe) else ()))
    machine = compilers.architectures()[0]
    kernels = compile_kernels(tmp_path, compiler, machine, flags, INTRINSICS)
    program = link_driver(tmp_path, "check_kernels", compiler, kernels, ADDRESS)
    assert " 0 failures" in run([program, "quick"])
    assert " 0 failures" in run([program, "hostile"])
    fuzz = link_driver(
        tmp_path, "fuzz_packed", compiler, kernels, (*ADDRESS, "-DZS_FUZZ_ROUNDS=5000")
    )
    assert "5000 inputs" in run([fuzz])


def test_threads(tmp_path: Path, compiler: str) -> None:
    kernels = compile_kernels(tmp_path, compiler, compilers.architectures()[0], THREAD)
    program = link_driver(tmp_path, "check_kernels", compiler, kernels, THREAD)
    assert " 0 failures" in run([program, "threads"], TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"{ARM_COMPILER} or {ARM_EMULATOR} is not installed "
    "(Debian: apt-get install g++-aarch64-linux-gnu qemu-user)",
)
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    kernels = compile_kernels(tmp_path, ARM_COMPILER, "aarch64", ("-O1",))
    program = link_driver(tmp_path, "check_kernels", ARM_COMPILER, kernels, ("-static",))
    said = run([ARM_EMULATOR, program, "quick"])
    for kernel in ("neon-dot", "neon-tile", "neon-skip", "neon-int8", "neon-dotprod-int8"):
        assert kernel in said.split()
    assert " 0 failures" in said
    assert " 0 failures" in run([ARM_EMULATOR, program, "hostile"])
    # A CPU of ARMv8.0 has no dot-product instructions, so that kernel must not be offered.
    old = run([ARM_EMULATOR, "-cpu", "cortex-a72", program, "hostile"]).split()
    assert "neon-int8" in old
    assert "neon-dotprod-int8" not in old
