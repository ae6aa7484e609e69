"""The shared library of CPU kernels, through its C interface."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

from zeroskip.ir.errors import KernelLibraryError, LoweringError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.kernels.location import library_path as library_path

ABI_VERSION = 1
MESSAGE_SIZE = 256
VALUE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}


class _Weight(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("bitmask", c_void_p),
        ("bitmask_count", c_int64),
        ("row_offsets", c_void_p),
        ("row_offsets_count", c_int64),
        ("values", c_void_p),
        ("values_count", c_int64),
        ("scales", c_void_p),
        ("scales_count", c_int64),
        ("block_size", c_int64),
        ("value_type", c_int32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("layout", c_int32),
        ("accuracy_level", c_int32),
        ("instruction_set", c_char_p),
        ("kernel", c_char_p),
    )


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """Loads the library and declares its functions.

    Raises:
        LoweringError: It cannot be loaded, or is of another version.
    """
    try:
        library = ctypes.CDLL(os.fspath(path))
        version = library.zs_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelLibraryError(
            f"the kernel library cannot be loaded: {error}",
            where=str(path),
            next_step="delete it and install zeroskip again, or correct ZEROSKIP_LIBRARY",
        ) from error
    if version != ABI_VERSION:
        raise KernelLibraryError(
            f"the kernel library has interface version {version}, this is version {ABI_VERSION}",
            where=str(path),
            next_step="install zeroskip again",
        )
    library.zs_instruction_sets.restype = c_char_p
    library.zs_linear_create.argtypes = (
        POINTER(_Weight),
        POINTER(_Options),
        POINTER(c_void_p),
        c_char_p,
    )
    library.zs_linear_destroy.argtypes = (c_void_p,)
    library.zs_linear_destroy.restype = None
    library.zs_linear_bytes.argtypes = (c_void_p,)
    library.zs_linear_bytes.restype = c_size_t
    library.zs_linear_kernel.argtypes = (c_void_p, c_int64)
    library.zs_linear_kernel.restype = c_char_p
    library.zs_linear_workspace.argtypes = (c_void_p, c_int64)
    library.zs_linear_workspace.restype = c_size_t
    library.zs_linear_run.argtypes = (
        c_void_p,
        c_void_p,
        c_int64,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
    )
    library.zs_pool_create.argtypes = (c_int32,)
    library.zs_pool_create.restype = c_void_p
    library.zs_pool_destroy.argtypes = (c_void_p,)
    library.zs_pool_destroy.restype = None
    return library


class ThreadPool:
    """Threads for kernels that are called from Python.

    Args:
        library: The loaded library.
        threads: The calling one included.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self.handle: int = library.zs_pool_create(threads)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.zs_pool_destroy(self.handle)


class CpuLinear:
    """A packed weight made ready for this CPU.

    Args:
        library: The loaded library.
        weight: Its tensors are used where they are, and kept alive.
        layout: 0 runs on them as they are; 1 repacks them once for many tokens.
        accuracy_level: 4 rounds activations to 8 bits (int8 values only); 0 does not.
        instruction_set: The most that may be used, such as `avx2`; by default all there is.
        kernel: The kernel that must be used, by name; by default the fastest.

    Raises:
        LoweringError: The arrays contradict each other, or no kernel serves them.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: BitmaskWeight,
        *,
        layout: int = 0,
        accuracy_level: int = 0,
        instruction_set: str | None = None,
        kernel: str | None = None,
    ) -> None:
        self._library = library
        self._handle: int | None = None
        parts = (weight.bitmask, weight.row_offsets, weight.values, weight.scales)
        if any(part is not None and not part.is_contiguous() for part in parts):
            raise LoweringError("a packed tensor is not contiguous", next_step="pack it again")
        self.weight: BitmaskWeight | None = weight
        self.rows, self.columns = weight.rows, weight.columns
        scales = weight.scales
        view = _Weight(
            rows=weight.rows,
            columns=weight.columns,
            bitmask=weight.bitmask.data_ptr(),
            bitmask_count=weight.bitmask.numel() // 8,
            row_offsets=weight.row_offsets.data_ptr(),
            row_offsets_count=weight.row_offsets.numel(),
            values=weight.values.data_ptr(),
            values_count=weight.values.numel(),
            scales=None if scales is None else scales.data_ptr(),
            scales_count=0 if scales is None else scales.numel(),
            block_size=weight.block_size,
            value_type=VALUE_TYPES[weight.values.dtype],
        )
        options = _Options(
            layout=layout,
            accuracy_level=accuracy_level,
            instruction_set=instruction_set.encode() if instruction_set else None,
            kernel=kernel.encode() if kernel else None,
        )
        handle = c_void_p()
        message = ctypes.create_string_buffer(MESSAGE_SIZE)
        if library.zs_linear_create(byref(view), byref(options), byref(handle), message):
            raise LoweringError(message.value.decode(), next_step="pack the weight again")
        self._handle = handle.value

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.zs_linear_destroy(self._handle)

    def borrow(self) -> None:
        """Lets go of the packed tensors: from here on the caller keeps them alive."""
        self.weight = None

    @property
    def nbytes(self) -> int:
        """The memory held besides the packed tensors."""
        return int(self._library.zs_linear_bytes(self._handle))

    def kernel(self, m: int) -> str | None:
        """Returns the name of the kernel that serves m rows of x; None if none does."""
        name = self._library.zs_linear_kernel(self._handle, m)
        return None if name is None else str(name.decode())

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, pool: ThreadPool | None = None
    ) -> torch.Tensor:
        """Returns x W^T + bias.

        Args:
            x: float32 [..., columns].
            bias: float32 [rows] or None.
            pool: Threads; None uses the calling one.
        """
        if x.shape[-1:] != (self.columns,) or x.dtype != torch.float32 or not x.is_cpu:
            raise LoweringError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device}",
                next_step=f"pass float32 [..., {self.columns}] on the CPU",
            )
        if bias is not None and (bias.shape != (self.rows,) or bias.dtype != torch.float32):
            raise LoweringError(
                f"the bias is {tuple(bias.shape)} {bias.dtype}",
                next_step=f"pass float32 [{self.rows}], or None",
            )
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        bias = None if bias is None else bias.contiguous()
        m = x.shape[:-1].numel()
        failed = self._library.zs_linear_run(
            self._handle,
            x.data_ptr(),
            m,
            y.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None,
            ctypes.cast(self._library.zs_pool_run, c_void_p) if pool else None,
            pool.handle if pool else None,
        )
        if failed and self.kernel(m) is None:
            raise LoweringError(
                f"no kernel takes {m} rows",
                next_step="leave the choice of the kernel to the library",
            )
        if failed:
            raise MemoryError("no memory for the scratch space of a sparse linear")
        return y
