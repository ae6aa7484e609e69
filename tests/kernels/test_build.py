"""The build: what is compiled with which flags, what is exported, what is left out."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zeroskip.runtime.kernels import build, compilers

COMPILER = compilers.find_compiler()
FLAGS = ("-O0",)

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the compilers here are shell scripts"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


@pytest.fixture
def compiler() -> compilers.Compiler:
    assert COMPILER is not None
    return COMPILER


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder instead of the kernels: one function that counts the groups in the build."""
    folder = tmp_path / "sources"
    folder.mkdir()
    names = ("AVX2", "AVX512", "AMX", "NEON", "NEON_DOTPROD")
    (folder / "count.cpp").write_text(
        '#include <string>\nextern "C" __attribute__((visibility("default")))\n'
        "int zs_count() {\n  std::string found;\n"
        + "".join(f'#ifdef ZS_HAVE_{name}\n  found += "x";\n#endif\n' for name in names)
        + "  return (int)found.size();\n}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def limited(tmp_path: Path, compiler: compilers.Compiler, *unknown: str) -> compilers.Compiler:
    """A compiler that does not know some flags."""
    script = tmp_path / "limited"
    patterns = "|".join(f"*{flag}*" for flag in unknown)
    script.write_text(
        f'#!/bin/sh\ncase " $* " in {patterns}) echo unknown flag >&2; exit 1;; esac\n'
        f'exec {" ".join(compiler.command)} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return compilers.Compiler((str(script),), "limited 1.0")


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real sources without those for an instruction set."""
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("portable") / build.LIBRARY
    build.compile_library(library, COMPILER, extra=FLAGS, groups=())
    return library


def test_the_portable_sources_are_a_library_of_their_own(portable: Path) -> None:
    library = ctypes.CDLL(str(portable))
    assert library.zs_abi_version() == 1
    record = build.read_record(portable)
    assert record["groups"] == []
    assert record["sources"] == build.source_hash()


@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
def test_only_the_c_interface_is_exported(portable: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(portable)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert "zs_linear_run" in names
    assert {name for name in names if not name.startswith("zs_")} <= {"RegisterCustomOps"}


@pytest.mark.skipif(not shutil.which("readelf"), reason="there is no readelf")
def test_the_library_needs_no_cpp_library(portable: Path) -> None:
    command = ["readelf", "-d", str(portable)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [line for line in listed.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if "libstdc++" in line or "libgcc" in line]


def test_a_group_is_built_where_machine_and_compiler_know_it(
    sources: Path, tmp_path: Path, compiler: compilers.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "architectures", lambda: ["x86_64"])
    if not _is_x86():
        pytest.skip("needs an x86-64 machine")
    for name in ("avx2_a", "avx512_a", "avx512_b", "amx_a", "neon_a", "neon_dotprod_a"):
        (sources / f"{name}.cpp").write_text(f"int {name};\n", encoding="utf-8")
    old = limited(tmp_path, compiler, "-mamx-tile", "-mavx512vbmi2")
    output = tmp_path / "old" / build.LIBRARY
    record = build.compile_library(output, old, extra=FLAGS)
    assert (record["groups"], record["left_out"]) == (["avx2"], ["avx512", "amx"])
    assert ctypes.CDLL(str(output)).zs_count() == 1
    assert build.read_record(output) == record

    output = tmp_path / "chosen" / build.LIBRARY
    record = build.compile_library(output, compiler, extra=FLAGS, groups=("avx512",))
    assert (record["groups"], record["left_out"]) == (["avx512"], [])
    assert ctypes.CDLL(str(output)).zs_count() == 1


def _is_x86() -> bool:
    return compilers.platform.machine().lower() in compilers.X86


def test_every_group_of_this_machine_is_known_to_some_flag() -> None:
    assert build._group_of(Path("avx512_dot.cpp")) == "avx512"
    assert build._group_of(Path("avx2.cpp")) == "avx2"
    assert build._group_of(Path("neon_dotprod_int8.cpp")) == "neon_dotprod"
    assert build._group_of(Path("neon_float.cpp")) == "neon"
    assert build._group_of(Path("neonate.cpp")) == ""
    prefixes = {path.stem.split("_")[0] for path in build.SOURCES.glob("*_*.cpp")}
    known = {group.name.split("_")[0] for group in build.GROUPS}
    assert {name for name in prefixes if name.startswith(("avx", "amx", "neon", "sse"))} <= known


def test_two_builds_are_the_same_bytes(
    sources: Path, tmp_path: Path, compiler: compilers.Compiler
) -> None:
    outputs = [tmp_path / name / build.LIBRARY for name in ("a", "b")]
    for output in outputs:
        build.compile_library(output, compiler)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert str(sources).encode() not in outputs[0].read_bytes()


def test_an_error_holds_what_the_compiler_said_and_leaves_nothing(
    sources: Path, tmp_path: Path, compiler: compilers.Compiler
) -> None:
    (sources / "broken.cpp").write_text("#error planted\n", encoding="utf-8")
    output = tmp_path / "out" / build.LIBRARY
    with pytest.raises(compilers.BuildError, match=r"broken\.cpp(.|\n)*planted"):
        build.compile_library(output, compiler)
    assert list(output.parent.iterdir()) == []


def test_a_symbol_that_nothing_defines_is_an_error_of_the_build(
    sources: Path, tmp_path: Path, compiler: compilers.Compiler
) -> None:
    (sources / "open.cpp").write_text(
        'int absent();\nextern "C" int zs_open() { return absent(); }\n', encoding="utf-8"
    )
    with pytest.raises(compilers.BuildError, match="absent"):
        build.compile_library(tmp_path / build.LIBRARY, compiler, extra=FLAGS)


def test_without_a_static_cpp_library_the_shared_one_is_used(
    sources: Path, tmp_path: Path, compiler: compilers.Compiler
) -> None:
    limits = limited(tmp_path, compiler, "-static-libstdc++")
    output = tmp_path / "out" / build.LIBRARY
    build.compile_library(output, limits, extra=FLAGS)
    assert ctypes.CDLL(str(output)).zs_count() == 0


def test_a_header_changes_the_hash(sources: Path) -> None:
    before = build.source_hash(sources)
    (sources / "new.h").write_text("#pragma once\n", encoding="utf-8")
    assert build.source_hash(sources) != before


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The two files that build, with one tiny source, in a folder that is no package."""
    folder = tmp_path / "copy"
    (folder / "cpu").mkdir(parents=True)
    for name in ("build.py", "compilers.py"):
        shutil.copy(Path(build.__file__).with_name(name), folder)
    (folder / "cpu" / "tiny.cpp").write_text("int tiny;\n", encoding="utf-8")
    return folder


def test_the_script_needs_nothing_but_the_file_beside_it(copy: Path, tmp_path: Path) -> None:
    with (copy / "compilers.py").open("a", encoding="utf-8") as file:
        file.write("print('beside')\n")
    output = tmp_path / "out" / build.LIBRARY
    # -I and -S: no zeroskip to import, and Python does not add the folder of the script.
    command = [sys.executable, "-I", "-S", str(copy / "build.py"), str(output), *FLAGS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("beside\n")
    assert output.is_file()


def test_both_files_that_build_change_the_hash(copy: Path) -> None:
    seen = set()
    for name in ("", "build.py", "compilers.py"):
        if name:
            with (copy / name).open("a", encoding="utf-8") as file:
                file.write("# another flag\n")
        code = "import runpy; print(runpy.run_path('build.py')['source_hash']())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 3


def test_cxx_names_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert compilers.find_compiler() is None
    script = tmp_path / "mine"
    script.write_text("#!/bin/sh\necho mine 7.0 $1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -m64")
    found = compilers.find_compiler()
    assert found is not None
    assert found.command == (str(script), "-m64")
    assert found.version == "mine 7.0 -m64"


def test_a_command_that_fails_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "stub"
    script.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert compilers.find_compiler() is None
