"""Which package may import which: ir nothing, runtime ir, passes both, and none of them the face."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "ir": {"ir"},
    "runtime": {"ir", "runtime"},
    "passes": {"ir", "runtime", "passes"},
}
FILES = sorted(path for layer in ALLOWED for path in (ROOT / layer).rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Every module that a file names, also inside functions and as text for importlib."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "zeroskip":
                found += [(node.lineno, f"zeroskip.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            found += [
                (node.lineno, argument.value)
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            ]
    return found


def _name(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def violations(layer: str, tree: ast.AST) -> list[str]:
    """The imports that a file of a layer must not have, each with its line."""
    found = []
    for line, module in imported(tree):
        first, _, rest = module.partition(".")
        own = first == "zeroskip" and rest.partition(".")[0] in ALLOWED[layer]
        if first in ("", *ALLOWED) or (first == "zeroskip" and not own):
            found.append(f"line {line}: {module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_layer_imports_only_what_lies_below(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    assert violations(layer, ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("ir", "import zeroskip.runtime"),
        ("ir", "from zeroskip.passes import PASSES"),
        ("ir", "from zeroskip import passes"),
        ("ir", "import zeroskip"),
        ("ir", "def f():\n    from zeroskip.compile import compile_sparse"),
        ("ir", "import importlib\nimportlib.import_module('zeroskip.passes.base')"),
        ("runtime", "from zeroskip.passes.base import Pass"),
        ("runtime", "from zeroskip.recipe import load_recipe"),
        ("passes", "from zeroskip.cli import main"),
        ("passes", "import ir.errors"),
        ("passes", "from . import base"),
    ],
)
def test_planted_violations_are_found(layer: str, code: str) -> None:
    assert violations(layer, ast.parse(code))


def test_what_is_allowed_is_not_found() -> None:
    code = "import torch\nfrom zeroskip.ir.errors import CompileError\nimport zeroskip.runtime.onnx"
    assert violations("passes", ast.parse(code)) == []
    assert violations("runtime", ast.parse(code)) == []


def test_there_are_files_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ALLOWED)
