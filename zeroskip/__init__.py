"""zeroskip: a compiler for post-training sparsity."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroskip.calibration import calibration_from_text
    from zeroskip.compile import CompiledModel, compile_sparse
    from zeroskip.evaluate import Perplexity, perplexity
    from zeroskip.models import load_model
    from zeroskip.recipe import Recipe, load_recipe
    from zeroskip.report import Report
    from zeroskip.runtime.onnx.custom_ops import custom_ops_path, session_options

__version__ = "0.1.0"

__all__ = [
    "CompiledModel",
    "Perplexity",
    "Recipe",
    "Report",
    "calibration_from_text",
    "compile_sparse",
    "custom_ops_path",
    "load_model",
    "load_recipe",
    "perplexity",
    "session_options",
]

# Where each name lives. It is imported when it is first asked for: `zeroskip --help` and
# `import zeroskip.ir.errors` need no torch.
_MODULES = {
    "CompiledModel": "compile",
    "Perplexity": "evaluate",
    "Recipe": "recipe",
    "Report": "report",
    "calibration_from_text": "calibration",
    "compile_sparse": "compile",
    "custom_ops_path": "runtime.onnx",
    "load_model": "models",
    "load_recipe": "recipe",
    "perplexity": "evaluate",
    "session_options": "runtime.onnx",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'zeroskip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zeroskip.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
