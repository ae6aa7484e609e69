"""The kernels under sanitizers and, for 64-bit ARM, under an emulator.

Each test builds sources and a driver as one program: tests/kernels/cpp/check_kernels.cpp compares
every kernel with a product in double, in memory of exactly the size that the interface asks for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zeroskip.runtime.kernels import build

DRIVERS = Path(__file__).parent / "cpp"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
THREAD = ("-fsanitize=thread",)
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sanitizers need GCC or clang")


def compile_kernels(
    folder: Path,
    compiler: str,
    machine: str,
    flags: tuple[str, ...],
    left_out: tuple[str, ...] = (),
) -> list[str]:
    """Compiles the kernels that a compiler knows for a machine; returns the objects."""
    defines, groups = [], {"": ""}
    for group in build.GROUPS:
        probe = folder / "probe.cpp"
        probe.write_text(group.probe)
        command = [compiler, *group.flags.split(), "-std=c++17", "-c", str(probe)]
        if group.name in left_out or machine not in group.machines:
            continue
        if _runs([*command, "-o", str(folder / "probe.o")]):
            groups[group.name] = group.flags
            defines.append(f"-DZS_HAVE_{group.name.upper()}")
    sources = {path: build._group_of(path) for path in sorted(build.SOURCES.glob("*.cpp"))}

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = [*groups[sources[source]].split(), *flags, *defines]
        # Optimising instrumented templates of intrinsics takes minutes, and finds nothing more.
        _run([compiler, "-std=c++17", "-O0", "-g1", *own, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, [path for path in sources if sources[path] in groups]))


def link_driver(
    folder: Path, driver: str, compiler: str, objects: list[str], flags: tuple[str, ...]
) -> str:
    """Compiles a driver and links it with the kernels; returns the program."""
    program, source = str(folder / driver), str(DRIVERS / f"{driver}.cpp")
    common = ["-std=c++17", "-O1", "-g1", f"-I{build.SOURCES}", *flags]
    _run([compiler, *common, source, *objects, "-o", program, "-pthread", "-ldl"])
    return program


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler of this machine whose programs run with every sanitizer."""
    found = build.find_compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "main.cpp", folder / "main"
    source.write_text("int main() { return 0; }\n")
    for flags in (ADDRESS, THREAD):
        command = [*found.command, *flags, str(source), "-o", str(program)]
        if not _runs(command) or not _runs([str(program)]):
            pytest.skip(f"the compiler or this system has no {flags[0]}")
    return found.command[0]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, compiler: str) -> list[str]:
    """The kernels of this machine with checks of addresses and of undefined behaviour."""
    folder = tmp_path_factory.mktemp("checked")
    return compile_kernels(folder, compiler, build.architectures()[0], ADDRESS)


def test_address_and_undefined_behaviour(tmp_path: Path, compiler: str, checked: list[str]) -> None:
    program = link_driver(tmp_path, "check_kernels", compiler, checked, ADDRESS)
    assert " 0 failures" in _run([program, "quick"])
    assert " 0 failures" in _run([program, "hostile"])


def test_mutated_inputs(tmp_path: Path, compiler: str, checked: list[str]) -> None:
    """The libFuzzer target as a plain program, over inputs from a fixed seed."""
    flags = (*ADDRESS, "-DZS_FUZZ_ROUNDS=400")
    program = link_driver(tmp_path, "fuzz_packed", compiler, checked, flags)
    assert "400 inputs" in _run([program])


def test_threads(tmp_path: Path, compiler: str) -> None:
    # What threads share is the same for all kernels: those that take a minute to compile are left out.
    kernels = compile_kernels(
        tmp_path, compiler, build.architectures()[0], THREAD, ("avx512", "amx")
    )
    program = link_driver(tmp_path, "check_kernels", compiler, kernels, THREAD)
    assert " 0 failures" in _run([program, "threads"], TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"{ARM_COMPILER} or {ARM_EMULATOR} is not installed "
    "(Debian: apt-get install g++-aarch64-linux-gnu qemu-user)",
)
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    flags = ("-static", "-O2")
    kernels = compile_kernels(tmp_path, ARM_COMPILER, "aarch64", flags)
    program = link_driver(tmp_path, "check_kernels", ARM_COMPILER, kernels, flags)
    said = _run([ARM_EMULATOR, program, "quick"])
    for kernel in ("neon-dot", "neon-tile", "neon-skip", "neon-int8", "neon-dotprod-int8"):
        assert kernel in said.split()
    assert " 0 failures" in said
    assert " 0 failures" in _run([ARM_EMULATOR, program, "hostile"])
    # A CPU of ARMv8.0 has no dot-product instructions, so that kernel must not be offered.
    old = _run([ARM_EMULATOR, "-cpu", "cortex-a72", program, "hostile"]).split()
    assert "neon-int8" in old
    assert "neon-dotprod-int8" not in old
