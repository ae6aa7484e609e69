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


def compile_program(
    folder: Path, driver: str, compiler: str, machine: str, flags: tuple[str, ...]
) -> Path:
    """Compiles the kernels for a machine and a driver into one program."""
    defines, groups = [], {"": ""}
    for group in build.GROUPS:
        probe = folder / "probe.cpp"
        probe.write_text(group.probe)
        command = [compiler, *group.flags.split(), "-std=c++17", "-c", str(probe)]
        if machine in group.machines and _runs([*command, "-o", str(folder / "probe.o")]):
            groups[group.name] = group.flags
            defines.append(f"-DZS_HAVE_{group.name.upper()}")
    sources = {path: build._group_of(path) for path in sorted(build.SOURCES.glob("*.cpp"))}
    sources[DRIVERS / f"{driver}.cpp"] = ""

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = [*groups[sources[source]].split(), *flags, *defines, f"-I{build.SOURCES}"]
        common = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
        _run([compiler, *common, *own, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [s for s in sources if sources[s] in groups]))
    program = folder / driver
    _run([compiler, *flags, *objects, "-o", str(program), "-pthread", "-ldl"])
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


def test_address_and_undefined_behaviour(tmp_path: Path, compiler: str) -> None:
    machine = build.architectures()[0]
    program = compile_program(tmp_path, "check_kernels", compiler, machine, ADDRESS)
    assert " 0 failures" in _run([str(program), "all"])
    assert " 0 failures" in _run([str(program), "hostile"])


def test_threads(tmp_path: Path, compiler: str) -> None:
    machine = build.architectures()[0]
    program = compile_program(tmp_path, "check_kernels", compiler, machine, THREAD)
    said = _run([str(program), "threads"], TSAN_OPTIONS="halt_on_error=1")
    assert " 0 failures" in said


def test_mutated_inputs(tmp_path: Path, compiler: str) -> None:
    """The libFuzzer target as a plain program, over inputs from a fixed seed."""
    flags = (*ADDRESS, "-DZS_FUZZ_ROUNDS=400")
    machine = build.architectures()[0]
    program = compile_program(tmp_path, "fuzz_packed", compiler, machine, flags)
    assert "400 inputs" in _run([str(program)])


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"{ARM_COMPILER} or {ARM_EMULATOR} is not installed "
    "(Debian: apt-get install g++-aarch64-linux-gnu qemu-user)",
)
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    flags = ("-static", "-O2")
    program = compile_program(tmp_path, "check_kernels", ARM_COMPILER, "aarch64", flags)
    said = _run([ARM_EMULATOR, str(program), "quick"])
    for kernel in ("neon-dot", "neon-tile", "neon-skip", "neon-int8", "neon-dotprod-int8"):
        assert kernel in said.split()
    assert " 0 failures" in said
    assert " 0 failures" in _run([ARM_EMULATOR, str(program), "hostile"])
    # A CPU of ARMv8.0 has no dot-product instructions, so that kernel must not be offered.
    old = _run([ARM_EMULATOR, "-cpu", "cortex-a72", str(program), "hostile"]).split()
    assert "neon-int8" in old and "neon-dotprod-int8" not in old


@pytest.mark.parametrize("name", ["avx2", "avx512", "amx", "neon_dotprod"])
def test_shared_templates_come_from_the_least_demanding_object(name: str) -> None:
    """A linker keeps the first copy of a template: the order of objects must be that of GROUPS."""
    order = [group.name for group in build.GROUPS]
    assert order.index("avx2") < order.index("avx512") < order.index("amx")
    assert order.index("neon") < order.index("neon_dotprod")
    assert name in order
