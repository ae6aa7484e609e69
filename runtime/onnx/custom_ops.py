"""The kernels in ONNX Runtime: the library of zeroskip::SparseLinear, and sessions that use it."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx.model_imports import imports_domain
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN


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
    """Tells whether a model has packed weights, by the operators that it imports; reads no graph.

    Raises:
        ArtifactError: The file is no ONNX model.
    """
    return imports_domain(model_path, DOMAIN)


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
