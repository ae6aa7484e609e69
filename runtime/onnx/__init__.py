"""Program to ONNX: cache graphs, translation, files that clients open, parity, and sparse kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroskip.runtime.onnx.custom_ops import custom_ops_path, session_options

__all__ = ["custom_ops_path", "session_options"]


def __getattr__(name: str) -> object:
    # onnxruntime is imported when a name is first asked for, not with every module of the folder.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zeroskip.runtime.onnx import custom_ops

    return getattr(custom_ops, name)
