"""The kernels in ONNX Runtime: the library of zeroskip::SparseLinear, and sessions that use it."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnxruntime

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx.sparse_linear import is_sparse_linear, walk


class DenseFallbackWarning(UserWarning):
    """A model with packed weights runs without the kernels: right, but not fast."""


def custom_ops_path() -> str:
    """Returns the library to register with ONNX Runtime, from any language.

    Raises:
        KernelLibraryError: There is none and none can be built; says why and what to do.
    """
    from zeroskip.runtime.kernels.library import library_path

    return str(library_path())


def session_options(
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.SessionOptions:
    """Returns session options under which SparseLinear runs on zeroskip's kernels.

    Args:
        options: Gets the library registered; None makes new ones.

    Raises:
        KernelLibraryError: There is no library.
        ArtifactError: ONNX Runtime refuses it, for instance because it is older than 1.17.
    """
    path = custom_ops_path()
    options = onnxruntime.SessionOptions() if options is None else options
    try:
        options.register_custom_ops_library(path)
    # ONNX Runtime raises a family of its own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime refuses the kernel library: {error}",
            where=path,
            next_step="run `zeroskip doctor`",
        ) from error
    return options


def uses_sparse_linear(model_path: str | Path) -> bool:
    """Tells whether a model has packed weights; reads its graph, not its external data.

    Raises:
        ArtifactError: The file is no ONNX model.
    """
    try:
        model = onnx.load(model_path, load_external_data=False)
    # Parsers raise errors of their own, derived from nothing more specific.
    except Exception as error:
        raise ArtifactError(
            f"the model cannot be read: {error}",
            where=str(model_path),
            next_step="pass an ONNX file",
        ) from error
    return any(is_sparse_linear(node) for node in walk(model.graph))


def warn_dense_fallback(model_path: str | Path, *, stacklevel: int = 2) -> None:
    """Warns when a model with packed weights is about to be opened without the library."""
    if uses_sparse_linear(model_path):
        warnings.warn(
            f"{model_path} has packed weights and is opened without their kernels: it runs through "
            "its function body, at dense speed and with much memory at load. Run `zeroskip doctor` "
            "to get the kernels, or `zeroskip export --dense` to write the plain form.",
            DenseFallbackWarning,
            stacklevel=stacklevel,
        )
