"""C++ programs for tests: the kernels and a driver, compiled otherwise than the library is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zeroskip.runtime.kernels import build

DRIVERS = Path(__file__).parent / "cpp"


def compile_kernels(
    folder: Path,
    compiler: str,
    machine: str,
    flags: Sequence[str],
    group_flags: Sequence[str] = (),
) -> list[str]:
    """Compiles the kernels that a compiler knows for a machine.

    Args:
        folder: Where the objects go.
        compiler: The command.
        machine: What it compiles for, such as `x86_64`.
        flags: For every source.
        group_flags: After those, for the sources that need an instruction set.

    Returns:
        The paths of the objects.
    """
    groups = {"": list[str]()}
    for group in build.GROUPS:
        if machine in group.machines and _knows(folder, compiler, group):
            groups[group.name] = [*group.flags.split(), *group_flags]
    defines = [f"-DZS_HAVE_{name.upper()}" for name in groups if name]
    sources = {path: build._group_of(path) for path in sorted(build.SOURCES.glob("*.cpp"))}

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = [*flags, *groups[sources[source]], *defines]
        run([compiler, "-std=c++17", "-g1", *own, "-c", str(source), "-o", str(target)])
        return str(target)

    # Those that take longest begin first.
    wanted = sorted((path for path in sources if sources[path] in groups), key=_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, wanted))


def link_driver(
    folder: Path, driver: str, compiler: str, objects: Sequence[str], flags: Sequence[str]
) -> str:
    """Compiles tests/kernels/cpp/DRIVER.cpp and links it with the kernels; returns the program."""
    program, source = str(folder / driver), str(DRIVERS / f"{driver}.cpp")
    common = ["-std=c++17", "-O1", "-g1", f"-I{build.SOURCES}", *flags]
    run([compiler, *common, source, *objects, "-o", program, "-pthread", "-ldl"])
    return program


def runs(command: Sequence[str]) -> bool:
    """Whether a command succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(command: Sequence[str], **environment: str) -> str:
    """Runs a command that has to succeed; returns what it prints."""
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


def _knows(folder: Path, compiler: str, group: build.Group) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text(group.probe, encoding="utf-8")
    command = [compiler, *group.flags.split(), "-std=c++17", "-c", str(probe)]
    return runs([*command, "-o", str(folder / "probe.o")])


def _size(path: Path) -> int:
    return path.stat().st_size
