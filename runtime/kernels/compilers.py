"""C++ compilers: how one is found, and its commands for a shared library.

Standard library only, as for `build.py`, which needs it before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GNU = "-std=c++17 -O3 -DNDEBUG -fvisibility=hidden -fno-math-errno -Wall -Wextra"
MSVC = "/nologo /std:c++17 /O2 /DNDEBUG /EHsc /MT /W3"

X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")


class BuildError(Exception):
    """A library cannot be built; holds the command and what the compiler said."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that runs.

    Attributes:
        command: How it is called.
        version: What it says about itself, one line.
        msvc: Whether it takes the options of cl.exe.
        environment: The variables that it needs beyond those of this process.
    """

    command: tuple[str, ...]
    version: str
    msvc: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def find_compiler() -> Compiler | None:
    """Returns the compiler that CXX names, else the one of this machine, else None."""
    if given := os.environ.get("CXX"):
        return _compiler(tuple(shlex.split(given, posix=os.name == "posix")))
    if sys.platform == "win32" and (found := _visual_studio()):
        return found
    if sys.platform == "darwin" and not _output(["xcode-select", "-p"]):
        return None  # The c++ of a bare macOS opens a dialog that offers the developer tools.
    return next(filter(None, (_compiler((name,)) for name in ("c++", "g++", "clang++"))), None)


def this_platform() -> str:
    """Returns the system and the architectures that a build here is for: `linux-x86_64`."""
    return "-".join((sys.platform, *architectures()))


def architectures() -> list[str]:
    """Returns the machines to build for: one, or on macOS those that ARCHFLAGS names."""
    words = os.environ.get("ARCHFLAGS", "").split() if sys.platform == "darwin" else []
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-arch"]
    return named or [platform.machine().lower()]


class Toolchain:
    """The commands of one compiler for one machine.

    Args:
        compiler: What runs.
        machine: One of `architectures()`.
        sources: The folder of what is compiled; its path is kept out of the objects.
        work: A folder to make, for all that is written.
        extra: Flags after all others, for the compiler and the linker.
    """

    def __init__(
        self, compiler: Compiler, machine: str, sources: Path, work: Path, extra: Sequence[str]
    ) -> None:
        self.compiler, self.machine, self.work = compiler, machine, work
        self._environment = {**os.environ, **dict(compiler.environment)}
        self._last = [*shlex.split(os.environ.get("CXXFLAGS", "")), *extra]
        self._link_last = [*shlex.split(os.environ.get("LDFLAGS", "")), *self._last]
        self._sanitized = any(flag.startswith("-fsanitize") for flag in self._last)
        work.mkdir()
        if compiler.msvc:
            self._flags = MSVC.split()
            return
        self._architecture = ["-arch", machine] if sys.platform == "darwin" else []
        self._flags = [*self._architecture, *GNU.split()]
        if sys.platform != "win32":
            self._flags.append("-fPIC")
        # Paths of the building machine would make two builds of the same sources differ.
        mapping = f"-ffile-prefix-map={sources}=."
        if self.knows("int probe;", [mapping]):
            self._flags.append(mapping)

    def compile(self, source: Path, flags: Sequence[str]) -> Path:
        """Compiles a source; returns the object."""
        target = self.work / f"{source.stem}.o"
        command = [*self.compiler.command, *self._flags, *flags, *self._last]
        output = [f"/Fo{target}"] if self.compiler.msvc else ["-o", str(target)]
        self._run([*command, "-c", str(source), *output])
        return target

    def knows(self, code: str, flags: Sequence[str]) -> bool:
        """Returns whether some code can be compiled with some flags."""
        probe = self.work / "probe.cpp"
        probe.write_text(code + "\n", encoding="utf-8")
        try:
            self.compile(probe, flags)
        except BuildError:
            return False
        return True

    def link(self, objects: Sequence[Path], name: str) -> Path:
        """Links a shared library of this name that exports the C interface only; returns it."""
        library = self.work / name
        inputs = [str(path) for path in objects]
        if self.compiler.msvc:
            # Brepro: no time stamp.
            output = [f"/Fe{library}", "/link", "/DLL", "/Brepro", *self._link_last]
            self._run([*self.compiler.command, "/nologo", "/LD", *inputs, *output])
            return library
        command = [*self.compiler.command, "-shared", *self._architecture, "-pthread"]
        exports = self.work / "exports"
        if sys.platform == "darwin":
            exports.write_text("_zs_*\n_RegisterCustomOps*\n", encoding="utf-8")
            command += [f"-Wl,-exported_symbols_list,{exports}"]
            command += [f"-Wl,-install_name,@rpath/{name}"]
        elif sys.platform != "win32":
            # Without this the C++ library's own templates would be exported too.
            exports.write_text("{ global: zs_*; RegisterCustomOps*; local: *; };\n", "utf-8")
            command += [f"-Wl,--version-script={exports}", f"-Wl,-soname,{name}"]
            # A sanitizer's run-time library comes with the program, not with this library.
            command += [] if self._sanitized else ["-Wl,--no-undefined"]
        output = ["-o", str(library), *self._link_last]
        # A library that carries its C++ library runs on machines with an older one, or none.
        static = ["-static-libstdc++", "-static-libgcc"] if sys.platform != "darwin" else []
        try:
            self._run([*command, *static, *inputs, *output])
        except BuildError:
            if not static:
                raise
            self._run([*command, *inputs, *output])  # This machine has no static one.
        return library

    def _run(self, command: Sequence[str]) -> None:
        run(command, self._environment)


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs a command of a build.

    Raises:
        BuildError: It cannot be run, or fails; with what it said.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}\n{error}") from error
    if done.returncode:
        said = (done.stderr + done.stdout).strip()
        raise BuildError(f"{shlex.join(command)}\n{said[-4000:]}")


def _compiler(command: tuple[str, ...]) -> Compiler | None:
    if not command or not shutil.which(command[0]):
        return None
    if Path(command[0]).stem.lower() == "cl":
        return Compiler(command, _cl_version(command, dict(os.environ)), msvc=True)
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return None
    return Compiler(command, done.stdout.partition("\n")[0]) if done.returncode == 0 else None


def _visual_studio() -> Compiler | None:
    """The compiler of the newest Visual Studio, with the variables that its set-up script sets."""
    if "INCLUDE" in os.environ and shutil.which("cl"):  # a developer's prompt
        return _compiler(("cl",))
    programs = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    query = ["-latest", "-products", "*", "-requires", tools, "-property", "installationPath"]
    folder = _output([str(vswhere), *query]).strip()
    if not folder:
        return None
    script = Path(folder, "VC", "Auxiliary", "Build", "vcvarsall.bat")
    target = "arm64" if platform.machine().lower() in ARM else "x64"
    printed = _output(f'cmd /u /c ""{script}" {target} >nul && set"', encoding="utf-16-le")
    variables = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    path = next((value for name, value in variables.items() if name.upper() == "PATH"), "")
    cl = shutil.which("cl", path=path)
    if not cl:
        return None
    version = _cl_version((cl,), {**os.environ, **variables})
    return Compiler((cl,), version, msvc=True, environment=tuple(variables.items()))


def _cl_version(command: tuple[str, ...], environment: Mapping[str, str]) -> str:
    """The first line that cl.exe prints when it is given nothing to do."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    return done.stderr.partition("\n")[0].strip()


def _output(command: str | list[str], encoding: str = "utf-8") -> str:
    """What a command prints, or nothing when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding=encoding, errors="replace", check=False
        )
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
