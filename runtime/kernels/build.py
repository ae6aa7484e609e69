"""Builds the CPU kernels with a C++ compiler: when pip installs zeroskip, or at their first use.

Standard library only: setup.py loads this file by its path, before anything is installed.

    python runtime/kernels/build.py [LIBRARY [FLAG ...]]

CXX names the compiler; CXXFLAGS and LDFLAGS come after the flags chosen here, and FLAGs last.
On macOS, ARCHFLAGS ("-arch arm64 -arch x86_64") names the architectures.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent / "cpu"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = f"zeroskip_kernels{SUFFIX}"

GNU = "-std=c++17 -O3 -DNDEBUG -fvisibility=hidden -fno-math-errno -Wall -Wextra"
MSVC = "/nologo /std:c++17 /O2 /DNDEBUG /EHsc /MT /W3"

X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")
_AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt"
_AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi2 -mavx512vnni {_AVX2}"


class Group(NamedTuple):
    """Sources for one instruction set: `NAME.cpp` and `NAME_*.cpp`.

    They are compiled where the machine and the compiler know it. The other sources see
    ZS_HAVE_<NAME> then, and leave its kernels out otherwise.
    """

    name: str
    machines: tuple[str, ...]
    flags: str
    msvc_flags: str
    probe: str  # a function that a compiler without the instruction set cannot compile


GROUPS = (
    Group(
        "avx2",
        X86,
        _AVX2,
        "/arch:AVX2",
        "#include <immintrin.h>\n__m256 probe(__m256 a) { return _mm256_fmadd_ps(a, a, a); }",
    ),
    Group(
        "avx512",
        X86,
        _AVX512,
        "/arch:AVX512",
        "#include <immintrin.h>\n__m512i probe(__mmask32 mask, __m512i a) {\n"
        "  return _mm512_dpbusd_epi32(a, a, _mm512_maskz_expand_epi16(mask, a));\n}",
    ),
    Group(
        "amx",
        X86,
        f"-mamx-tile -mamx-int8 -mamx-bf16 -mavx512bf16 {_AVX512}",
        "/arch:AVX512",
        "#include <immintrin.h>\nvoid probe() { _tile_zero(0); _tile_dpbusd(0, 1, 2); }",
    ),
    Group(
        "neon",
        ARM,
        "",
        "",
        "#include <arm_neon.h>\nfloat32x4_t probe(float32x4_t a) { return vfmaq_f32(a, a, a); }",
    ),
    Group(
        "neon_dotprod",
        ARM,
        "-march=armv8.2-a+dotprod",
        "/arch:armv8.2",
        "#include <arm_neon.h>\n"
        "int32x4_t probe(int32x4_t s, int8x16_t a) { return vdotq_s32(s, a, a); }",
    ),
)


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


def source_hash(sources: Path = SOURCES) -> str:
    """Returns a hash of every source and of this file, whose flags matter as much."""
    digest = hashlib.sha256()
    for path in (*sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]), Path(__file__)):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build_key(compiler: Compiler) -> str:
    """Returns what tells builds apart: sources, compiler, flags and platform, as 16 hex digits."""
    variables = [os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS", "ARCHFLAGS")]
    parts = [source_hash(), compiler.version, *compiler.command, *variables, this_platform()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def this_platform() -> str:
    """Returns the system and the architectures that a build here is for: `linux-x86_64`."""
    return "-".join((sys.platform, *architectures()))


def architectures() -> list[str]:
    """Returns the machines to build for: one, or on macOS those that ARCHFLAGS names."""
    words = os.environ.get("ARCHFLAGS", "").split() if sys.platform == "darwin" else []
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-arch"]
    return named or [platform.machine().lower()]


def read_record(library: Path) -> dict[str, Any]:
    """Returns what lies beside a library about its build; empty when nothing readable does."""
    try:
        record = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def compile_library(
    output: Path,
    compiler: Compiler,
    *,
    extra: Sequence[str] = (),
    groups: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compiles and links the sources into one shared library that exports the C interface only.

    The library appears complete or not at all. A record of the build is put beside it.

    Args:
        output: The library.
        compiler: What compiles it.
        extra: Flags after all others, for the compiler and the linker.
        groups: Names of the GROUPS to build; None means all that the compiler knows.

    Returns:
        The record: the hash of the sources, the key of the build, compiler, groups built and left out.

    Raises:
        BuildError: The compiler or the linker refuses; with its message.
    """
    record: dict[str, Any] = {
        "sources": source_hash(),
        "key": build_key(compiler),
        "compiler": compiler.version,
        "platform": this_platform(),
        "extra": list(extra),
        "groups": [],
        "left_out": [],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        work, made = Path(scratch), []
        for machine in architectures():
            toolchain = _Toolchain(compiler, machine, work / machine, extra)
            made.append(_build(toolchain, groups, record))
        library = made[0]
        if len(made) > 1:
            library = work / output.name
            _run(["lipo", "-create", *map(str, made), "-output", str(library)], os.environ)
        description = work / "record.json"
        description.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        # In this order a library never lies beside a record that is not its own.
        output.with_suffix(".json").unlink(missing_ok=True)
        os.replace(library, output)
        os.replace(description, output.with_suffix(".json"))
    return record


def _build(toolchain: _Toolchain, wanted: Collection[str] | None, record: dict[str, Any]) -> Path:
    """Builds for one machine; adds to the record what was built and what was left out."""
    sources: dict[str, list[Path]] = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        sources.setdefault(_group_of(path), []).append(path)
    chosen = [(path, list[str]()) for path in sources.pop("")]
    defines = []
    for group in GROUPS:
        if group.name not in sources or toolchain.machine not in group.machines:
            continue
        if wanted is not None and group.name not in wanted:
            continue
        flags = (group.msvc_flags if toolchain.compiler.msvc else group.flags).split()
        known = toolchain.knows(group.probe, flags)
        record["groups" if known else "left_out"].append(group.name)
        if known:
            defines.append(f"-DZS_HAVE_{group.name.upper()}")
            chosen += [(path, flags) for path in sources[group.name]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        objects = pool.map(lambda each: toolchain.compile(each[0], [*each[1], *defines]), chosen)
        # Least demanding first: where sources share a template of the C++ library, linkers keep the
        # first copy, and one made for a better instruction set would stop older CPUs.
        return toolchain.link(list(objects))


def _group_of(path: Path) -> str:
    """The longest name of a group that the name of a source begins with, or nothing."""
    names = [group.name for group in GROUPS if f"{path.stem}_".startswith(f"{group.name}_")]
    return max(names, key=len, default="")


class _Toolchain:
    """The commands of one compiler for one machine, in a folder of their own."""

    def __init__(self, compiler: Compiler, machine: str, work: Path, extra: Sequence[str]) -> None:
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
        mapping = f"-ffile-prefix-map={SOURCES}=."
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

    def link(self, objects: Sequence[Path]) -> Path:
        """Links a shared library; returns it."""
        library = self.work / LIBRARY
        names = [str(path) for path in objects]
        if self.compiler.msvc:
            # Brepro: no time stamp.
            output = [f"/Fe{library}", "/link", "/DLL", "/Brepro", *self._link_last]
            self._run([*self.compiler.command, "/nologo", "/LD", *names, *output])
            return library
        command = [*self.compiler.command, "-shared", *self._architecture, "-pthread"]
        exports = self.work / "exports"
        if sys.platform == "darwin":
            exports.write_text("_zs_*\n_RegisterCustomOps*\n", encoding="utf-8")
            command += [f"-Wl,-exported_symbols_list,{exports}"]
            command += [f"-Wl,-install_name,@rpath/{LIBRARY}"]
        elif sys.platform != "win32":
            # Without this the C++ library's own templates would be exported too.
            exports.write_text("{ global: zs_*; RegisterCustomOps*; local: *; };\n", "utf-8")
            command += [f"-Wl,--version-script={exports}", f"-Wl,-soname,{LIBRARY}"]
            # A sanitizer's run-time library comes with the program, not with this library.
            command += [] if self._sanitized else ["-Wl,--no-undefined"]
        output = ["-o", str(library), *self._link_last]
        # A library that carries its C++ library runs on machines with an older one, or none.
        static = ["-static-libstdc++", "-static-libgcc"] if sys.platform != "darwin" else []
        try:
            self._run([*command, *static, *names, *output])
        except BuildError:
            if not static:
                raise
            self._run([*command, *names, *output])  # This machine has no static one.
        return library

    def _run(self, command: Sequence[str]) -> None:
        _run(command, self._environment)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
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


def main(arguments: Sequence[str]) -> None:
    """Builds the library next to the sources, or where the first argument says."""
    output = Path(arguments[0]) if arguments else Path(__file__).parent / LIBRARY
    compiler = find_compiler()
    if compiler is None:
        sys.exit("there is no C++ compiler: install one, or name it in CXX")
    try:
        record = compile_library(output.absolute(), compiler, extra=arguments[1:])
    except BuildError as error:
        sys.exit(str(error))
    print(f"{output}: {', '.join(['portable', *record['groups']])}, by {record['compiler']}")
    if record["left_out"]:
        print(f"the compiler does not know: {', '.join(record['left_out'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
