"""Builds the CPU kernels with a C++ compiler: when pip installs zeroskip, or at their first use.

Standard library only, and `compilers.py`: setup.py loads this file by its path, before anything is
installed.

    python runtime/kernels/build.py [LIBRARY [FLAG ...]]

CXX names the compiler; CXXFLAGS and LDFLAGS come after the flags chosen here, and FLAGs last.
On macOS, ARCHFLAGS ("-arch arm64 -arch x86_64") names the architectures.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING or __package__:
    from zeroskip.runtime.kernels import compilers
else:  # A script, or loaded by setup.py: zeroskip cannot be imported, or is another version.
    sys.path.insert(0, str(Path(__file__).parent))
    import compilers

    del sys.path[0]

SOURCES = Path(__file__).parent / "cpu"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = f"zeroskip_kernels{SUFFIX}"

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
        compilers.X86,
        _AVX2,
        "/arch:AVX2",
        "#include <immintrin.h>\n__m256 probe(__m256 a) { return _mm256_fmadd_ps(a, a, a); }",
    ),
    Group(
        "avx512",
        compilers.X86,
        _AVX512,
        "/arch:AVX512",
        "#include <immintrin.h>\n__m512i probe(__mmask32 mask, __m512i a) {\n"
        "  return _mm512_dpbusd_epi32(a, a, _mm512_maskz_expand_epi16(mask, a));\n}",
    ),
    Group(
        "amx",
        compilers.X86,
        f"-mamx-tile -mamx-int8 -mamx-bf16 -mavx512bf16 {_AVX512}",
        "/arch:AVX512",
        "#include <immintrin.h>\nvoid probe() { _tile_zero(0); _tile_dpbusd(0, 1, 2); }",
    ),
    Group(
        "neon",
        compilers.ARM,
        "",
        "",
        "#include <arm_neon.h>\nfloat32x4_t probe(float32x4_t a) { return vfmaq_f32(a, a, a); }",
    ),
    Group(
        "neon_dotprod",
        compilers.ARM,
        "-march=armv8.2-a+dotprod",
        "/arch:armv8.2",
        "#include <arm_neon.h>\n"
        "int32x4_t probe(int32x4_t s, int8x16_t a) { return vdotq_s32(s, a, a); }",
    ),
)


def source_hash(sources: Path = SOURCES) -> str:
    """Returns a hash of every source, and of the two files whose flags matter as much."""
    digest = hashlib.sha256()
    here = Path(__file__)
    builders = (here, here.with_name("compilers.py"))
    for path in (*sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]), *builders):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build_key(compiler: compilers.Compiler) -> str:
    """Returns what tells builds apart: sources, compiler, flags and platform, as 16 hex digits."""
    variables = [os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS", "ARCHFLAGS")]
    parts = [
        source_hash(),
        compiler.version,
        *compiler.command,
        *variables,
        compilers.this_platform(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_record(library: Path) -> dict[str, Any]:
    """Returns what lies beside a library about its build; empty when nothing readable does."""
    try:
        record = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def compile_library(
    output: Path,
    compiler: compilers.Compiler,
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
        "platform": compilers.this_platform(),
        "extra": list(extra),
        "groups": [],
        "left_out": [],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        work, made = Path(scratch), []
        for machine in compilers.architectures():
            toolchain = compilers.Toolchain(compiler, machine, SOURCES, work / machine, extra)
            made.append(_build(toolchain, groups, record))
        library = made[0]
        if len(made) > 1:
            library = work / output.name
            compilers.run(["lipo", "-create", *map(str, made), "-output", str(library)], os.environ)
        description = work / "record.json"
        description.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        # In this order a library never lies beside a record that is not its own.
        output.with_suffix(".json").unlink(missing_ok=True)
        os.replace(library, output)
        os.replace(description, output.with_suffix(".json"))
    return record


def _build(
    toolchain: compilers.Toolchain, wanted: Collection[str] | None, record: dict[str, Any]
) -> Path:
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
        return toolchain.link(list(objects), LIBRARY)


def _group_of(path: Path) -> str:
    """The longest name of a group that the name of a source begins with, or nothing."""
    names = [group.name for group in GROUPS if f"{path.stem}_".startswith(f"{group.name}_")]
    return max(names, key=len, default="")


def main(arguments: Sequence[str]) -> None:
    """Builds the library next to the sources, or where the first argument says."""
    output = Path(arguments[0]) if arguments else Path(__file__).parent / LIBRARY
    compiler = compilers.find_compiler()
    if compiler is None:
        sys.exit("there is no C++ compiler: install one, or name it in CXX")
    try:
        record = compile_library(output.absolute(), compiler, extra=arguments[1:])
    except compilers.BuildError as error:
        sys.exit(str(error))
    print(f"{output}: {', '.join(['portable', *record['groups']])}, by {record['compiler']}")
    if record["left_out"]:
        print(f"the compiler does not know: {', '.join(record['left_out'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
