"""The one place that uses the ONNX exporter of transformers: rewrites for operators torch lacks.

Mixture-of-experts models and a few masks need them. The functions are private there, so a release
that moves them stops here, with the name of what moved.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from zeroskip.ir.errors import LoweringError


def onnx_patches() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which torch.onnx translates what transformers models contain."""
    patch = _private("transformers.exporters.utils", "apply_patches")
    # The patches register themselves when this module is imported.
    _private("transformers.exporters.exporter_onnx", "_ONNX_TRANSLATION_TABLE")
    return cast("contextlib.AbstractContextManager[None]", patch("onnx"))


def graph_fixes(graph_module: torch.fx.GraphModule) -> None:
    """Rewrites, in place, the nodes of an exported graph that torch.onnx cannot translate."""
    _private("transformers.exporters.utils", "apply_fx_node_fixes")("onnx", graph_module)


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Returns the onnxscript functions that replace torch's own, by operator."""
    table = _private("transformers.exporters.exporter_onnx", "_ONNX_TRANSLATION_TABLE")
    return cast("Mapping[Callable[..., Any], Callable[..., Any]]", table)


def _private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoweringError(
            f"this version of transformers has no {module}.{name}",
            where=module,
            next_step="install the version of transformers that zeroskip asks for",
        ) from error
