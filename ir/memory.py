"""Memory of the process: giving back what was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Hands memory that was freed back to the operating system, where the allocator keeps it.

    glibc keeps freed tensors in its heaps when small objects lie behind them; over the stages of a
    model that adds up to the size of the model. Elsewhere this does nothing.
    """
    trim = _glibc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _glibc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # Not glibc: macOS, Windows, musl.
    return trim
