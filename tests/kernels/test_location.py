"""Which kernel library is used, and that one is built at first use, in processes of their own.

The package is a copy with one tiny source instead of the kernels: what is built does not matter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zeroskip.runtime.kernels import build, compilers, location

ROOT = Path(__file__).parents[2]
MODULES = (
    "zeroskip/__init__.py",
    "ir/__init__.py",
    "ir/errors.py",
    "runtime/__init__.py",
    "runtime/kernels/__init__.py",
    "runtime/kernels/build.py",
    "runtime/kernels/compilers.py",
    "runtime/kernels/location.py",
    "runtime/kernels/cpu/sparse_linear.h",
)
SOURCE = """\
#include "sparse_linear.h"
extern "C" int32_t zs_abi_version(void) { return ZS_ABI_VERSION; }
"""
REPORT = """\
import ctypes, json
from zeroskip.ir.errors import KernelLibraryError
from zeroskip.runtime.kernels.location import library_path

try:
    path = library_path()
    print(json.dumps([str(path), ctypes.CDLL(str(path)).zs_abi_version()]))
except KernelLibraryError as error:
    print(json.dumps([None, str(error)]))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the compilers here are shell scripts"),
    pytest.mark.skipif(compilers.find_compiler() is None, reason="there is no C++ compiler"),
]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder to import a small zeroskip from."""
    site = tmp_path / "site"
    for name in MODULES:
        inside = name if name.startswith("zeroskip/") else f"zeroskip/{name}"
        (site / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, site / inside)
    (kernels_of(site) / "cpu" / "tiny.cpp").write_text(SOURCE, encoding="utf-8")
    return site


def kernels_of(site: Path) -> Path:
    return site / "zeroskip" / "runtime" / "kernels"


@pytest.fixture
def environment(site: Path, tmp_path: Path) -> dict[str, str]:
    """The variables of a process that imports the copy and has a cache of its own."""
    unset = ("CXX", "CXXFLAGS", "LDFLAGS", "ZEROSKIP_LIBRARY", "ZEROSKIP_BUILD")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "PYTHONPATH": str(site), "ZEROSKIP_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def find(environment: dict[str, str], tmp_path: Path) -> Callable[..., list[str | None]]:
    """Calls library_path() in a new process: the path and the version, or None and the error."""

    def find(**variables: str) -> list[str | None]:
        done = subprocess.run(
            [sys.executable, "-c", REPORT],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        found: list[str | None] = json.loads(done.stdout)
        return found

    return find


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty")}


def fake_compiler(tmp_path: Path, when_compiling: str) -> tuple[str, Path]:
    """A compiler that does something when it compiles tiny.cpp, and logs it; and its log."""
    real = compilers.find_compiler()
    assert real is not None
    script, log = tmp_path / "compiler", tmp_path / "log"
    log.write_text("", encoding="utf-8")
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *tiny.cpp*) echo once >> {log}; {when_compiling};; esac\n'
        f'exec {" ".join(real.command)} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script), log


Find = Callable[..., list[str | None]]


def test_a_compiler_that_appears_later_is_used_once(
    find: Find, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    path, problem = find(**no_compiler)
    assert path is None
    assert problem is not None
    assert "no C++ compiler" in problem
    assert location.compiler_advice() in problem

    compiler, log = fake_compiler(tmp_path, "true")
    path, version = find(CXX=compiler)
    assert version == 1
    assert path is not None
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert find(CXX=compiler) == [path, 1]
    assert log.read_text(encoding="utf-8").count("once") == 1
    # What was built stays usable when the compiler is gone, or may not be used.
    assert find(**no_compiler) == [path, 1]
    assert find(ZEROSKIP_BUILD="0") == [path, 1]


def test_a_compiler_that_cannot_be_run(find: Find) -> None:
    path, problem = find(CXX="/nonexistent/c++")
    assert path is None
    assert problem is not None
    assert "CXX names no compiler that runs" in problem
    assert "/nonexistent/c++" in problem


def test_four_processes_build_once(environment: dict[str, str], tmp_path: Path) -> None:
    compiler, log = fake_compiler(tmp_path, "sleep 2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT],
            cwd=tmp_path,
            env={**environment, "CXX": compiler},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1
    assert json.loads(found.pop())[1] == 1
    assert log.read_text(encoding="utf-8").count("once") == 1
    left = {path.name for path in (tmp_path / "cache" / "kernels").iterdir()}
    assert {name for name in left if name.startswith(".")} == set()


def test_a_failure_is_told_and_not_repeated(environment: dict[str, str], tmp_path: Path) -> None:
    compiler, log = fake_compiler(tmp_path, "echo tiny.cpp:1: out of luck >&2; exit 1")
    code = (
        "from zeroskip.ir.errors import KernelLibraryError\n"
        "from zeroskip.runtime.kernels import location\n"
        "for _ in range(3):\n"
        "    assert location.try_library_path() is None\n"
        "for _ in range(2):\n"
        "    try: location.library_path()\n"
        "    except KernelLibraryError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "CXX": compiler},
        capture_output=True,
        text=True,
        check=True,
    )
    assert log.read_text(encoding="utf-8").count("once") == 1
    assert done.stdout.count("tiny.cpp:1: out of luck") == 2  # asked twice, told twice
    assert done.stderr.count("tiny.cpp:1: out of luck") == 1  # one warning
    assert list((tmp_path / "cache" / "kernels").glob("*/")) == []


def test_building_can_be_forbidden(find: Find) -> None:
    path, problem = find(ZEROSKIP_BUILD="0")
    assert path is None
    assert problem is not None
    assert "ZEROSKIP_BUILD=0 forbids" in problem


def test_a_stale_library_is_not_used(find: Find, site: Path, tmp_path: Path) -> None:
    kernels = kernels_of(site)
    subprocess.run([sys.executable, str(kernels / "build.py")], check=True, capture_output=True)
    installed = str(kernels / build.LIBRARY)
    assert find() == [installed, 1]
    with (kernels / "cpu" / "tiny.cpp").open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    path, problem = find(ZEROSKIP_BUILD="0")
    assert path is None
    assert problem is not None
    assert "of other sources" in problem
    path, version = find()
    assert version == 1
    assert path is not None
    assert Path(path).is_relative_to(tmp_path / "cache")


def test_a_library_without_its_record_is_not_used(find: Find, site: Path, tmp_path: Path) -> None:
    (kernels_of(site) / build.LIBRARY).write_bytes(b"not a library")
    path, _ = find()
    assert path is not None
    assert Path(path).is_relative_to(tmp_path / "cache")


def test_other_flags_are_another_library(find: Find) -> None:
    assert find()[0] != find(CXXFLAGS="-O1")[0]


def test_a_named_library_goes_first(find: Find, site: Path, tmp_path: Path) -> None:
    named = tmp_path / "mine.so"
    subprocess.run(
        [sys.executable, str(kernels_of(site) / "build.py"), str(named)],
        check=True,
        capture_output=True,
    )
    assert find(ZEROSKIP_LIBRARY=str(named)) == [str(named), 1]
    path, problem = find(ZEROSKIP_LIBRARY=str(tmp_path / "absent.so"))
    assert path is None
    assert problem is not None
    assert str(tmp_path / "absent.so") in problem


def test_a_cache_that_cannot_be_written(find: Find, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    path, problem = find(ZEROSKIP_CACHE=str(tmp_path / "file"))
    assert path is None
    assert problem is not None
    assert "ZEROSKIP_CACHE" in problem


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache/zeroskip/kernels"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/zeroskip/kernels"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/zeroskip/kernels"),
        ("win32", {"HOME": "/h", "LOCALAPPDATA": "/l"}, "/l/zeroskip/kernels"),
        ("linux", {"HOME": "/h", "ZEROSKIP_CACHE": "/z"}, "/z/kernels"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, system: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "ZEROSKIP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert location.cache_folder() == Path(expected)
