"""What gets installed: every package, typed, and nothing at the top level but zeroskip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
FOLDERS = {"zeroskip": "zeroskip", "ir": "zeroskip.ir"} | {
    layer: f"zeroskip.{layer}" for layer in ("passes", "runtime")
}


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["tool"]["setuptools"])


def test_every_folder_with_an_init_is_a_listed_package(setuptools_table: dict[str, Any]) -> None:
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            below = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *below)))
    assert set(setuptools_table["packages"]) == found


def test_every_folder_with_modules_has_an_init() -> None:
    bare = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert bare == set()


def copy_sources(tree: Path, *ignored: str) -> None:
    """Copies what the package is made from, and nothing else."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    patterns = ("__pycache__", "*.pyc", "zeroskip_kernels.*", *ignored)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*patterns))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the compiled kernels, as pip builds it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    copy_sources(tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out)]
    done = subprocess.run(
        [*command, str(tree)],
        env={**os.environ, "ZEROSKIP_BUILD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.usefixtures("setuptools_table")
def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert "zeroskip/py.typed" in names
    cpp = {
        f"zeroskip/runtime/kernels/cpu/{path.name}"
        for path in (ROOT / "runtime" / "kernels" / "cpu").iterdir()
    }
    assert cpp
    assert {name for name in names if name.startswith("zeroskip/runtime/kernels/cpu/")} == cpp
    assert "zeroskip/runtime/kernels/cpu_table.json" in names
    assert "zeroskip/runtime/kernels/gpu_table.json" in names
    assert wheel.name.endswith("-py3-none-any.whl")
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zeroskip"}


def test_a_clean_install_has_no_bare_layers(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util as u, zeroskip, zeroskip.ir.errors, pathlib;"
        "print(pathlib.Path(zeroskip.ir.errors.__file__).as_posix());"
        "print([name for name in ('ir', 'passes', 'runtime') if u.find_spec(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    file, bare = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert bare == "[]"
