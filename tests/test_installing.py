"""Installing the CPU kernels: wheels, source distributions, editable installs, without a compiler.

Everything is built from a copy without the sources for instruction sets, and without optimisation:
how to build is tested here, not what.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_packaging import ROOT, copy_sources
from zeroskip.runtime.kernels import build, compilers

FAST = ("avx*.cpp", "amx*.cpp", "neon*.cpp")
HOOK = """\
import json, sys, setuptools.build_meta as backend
print(json.dumps(getattr(backend, sys.argv[1])(sys.argv[2])))
"""
PRODUCT = ROOT / "tests" / "kernels" / "product.py"

needs_compiler = pytest.mark.skipif(
    os.name != "posix" or compilers.find_compiler() is None, reason="there is no C++ compiler"
)
Build = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with nothing but setuptools."""
    folder = tmp_path_factory.mktemp("backend")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "setuptools>=77"], check=True)
    return python


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_sources(tree, *FAST)
    return tree


@pytest.fixture
def run_hook(backend: Path, tmp_path: Path) -> Build:
    """Calls a hook of the build backend: what it made, and what it said."""

    def run_hook(tree: Path, name: str, **variables: str) -> tuple[Path, str]:
        unset = ("CXX", "LDFLAGS", "ZEROSKIP_BUILD")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        out = tmp_path / name
        out.mkdir()
        done = subprocess.run(
            [str(backend), "-c", HOOK, name, str(out)],
            cwd=tree,
            env={**kept, "CXXFLAGS": "-O0", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout.splitlines()[-1])
        return out / made, done.stdout + done.stderr

    return run_hook


@needs_compiler
def test_a_wheel_of_the_source_distribution_computes(
    tree: Path, run_hook: Build, tmp_path: Path
) -> None:
    sdist, _ = run_hook(tree, "build_sdist")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    source = next(unpacked.iterdir())
    shutil.rmtree(tree)

    wheel, _ = run_hook(source, "build_wheel")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if build.LIBRARY in name] == [
        f"zeroskip/runtime/kernels/{build.LIBRARY}"
    ]
    shutil.rmtree(unpacked)

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    done = subprocess.run(
        [str(python), "-I", str(PRODUCT)],
        cwd=tmp_path,
        env={**os.environ, "ZEROSKIP_BUILD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder, _, numbers = done.stdout.strip().partition(" ")
    assert Path(folder).is_relative_to(venv)
    assert json.loads(numbers) == [201.5, 30.25]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler"),
        ({"PATH": "/nonexistent"}, "no C++ compiler"),
        ({"ZEROSKIP_BUILD": "0"}, "ZEROSKIP_BUILD=0"),
    ],
    ids=["CXX", "PATH", "ZEROSKIP_BUILD"],
)
def test_without_a_compiler_the_wheel_is_for_any_platform(
    tree: Path, run_hook: Build, variables: dict[str, str], reason: str
) -> None:
    wheel, said = run_hook(tree, "build_wheel", **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if build.LIBRARY in name]
    assert said.count("installed without its CPU kernels") == 1
    assert reason in said
    assert "zeroskip doctor" in said


@needs_compiler
def test_an_editable_install_builds_next_to_the_sources(tree: Path, run_hook: Build) -> None:
    run_hook(tree, "build_editable")
    library = tree / "runtime" / "kernels" / build.LIBRARY
    assert library.is_file()
    record = build.read_record(library)
    assert record["extra"] == []
    assert len(record["sources"]) == 64
    # The copy for a wheel is another one, and what lies in the tree is not taken into it.
    library.write_bytes(b"stale")
    wheel, _ = run_hook(tree, "build_wheel", ZEROSKIP_BUILD="0")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if build.LIBRARY in name]


@needs_compiler
def test_an_editable_install_whose_sources_do_not_compile_succeeds(
    tree: Path, run_hook: Build
) -> None:
    (tree / "runtime" / "kernels" / "cpu" / "broken.cpp").write_text("#error planted\n", "utf-8")
    _, said = run_hook(tree, "build_editable")
    assert "planted" in said
    assert "installed without its CPU kernels" in said
    assert not (tree / "runtime" / "kernels" / build.LIBRARY).exists()


def test_what_is_built_in_the_tree_is_ignored_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = [f"runtime/kernels/{build.LIBRARY}", "runtime/kernels/zeroskip_kernels.json"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names
