"""Computes y = x W^T + b with the installed library, through its C interface and ctypes alone.

A script, run by tests/test_installing.py and on every wheel that CI builds: it needs neither torch
nor anything else besides zeroskip, and fails unless the library is the one of the installation.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p, cast

from zeroskip.runtime.kernels.location import installed_library, library_path


class Weight(ctypes.Structure):
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


class Options(ctypes.Structure):
    _fields_ = (
        ("layout", c_int32),
        ("accuracy_level", c_int32),
        ("instruction_set", c_char_p),
        ("kernel", c_char_p),
    )


def main() -> None:
    """Prints where the library lies and [201.5, 30.25]."""
    path = library_path()
    assert path == installed_library(), path
    library = ctypes.CDLL(str(path))

    # W = [[1, 0, 2], [0, 3, 0]]; 64 more values may be read and are never used.
    bitmask, offsets = (c_uint64 * 2)(0b101, 0b010), (c_int64 * 3)(0, 2, 3)
    values = (c_float * (3 + 64))(1, 2, 3)
    weight = Weight(
        rows=2,
        columns=3,
        bitmask=cast(bitmask, c_void_p),
        bitmask_count=2,
        row_offsets=cast(offsets, c_void_p),
        row_offsets_count=3,
        values=cast(values, c_void_p),
        values_count=len(values),
    )
    linear, message = c_void_p(), ctypes.create_string_buffer(256)
    failed = library.zs_linear_create(byref(weight), byref(Options()), byref(linear), message)
    assert not failed, message.value

    x, bias, y = (c_float * 3)(1, 10, 100), (c_float * 2)(0.5, 0.25), (c_float * 2)()
    run, destroy = library.zs_linear_run, library.zs_linear_destroy
    run.argtypes = (c_void_p, c_void_p, c_int64, *[c_void_p] * 5)
    destroy.argtypes = (c_void_p,)
    assert not run(linear, x, 1, y, bias, None, None, None)
    destroy(linear)
    assert list(y) == [201.5, 30.25], list(y)
    print(path.parent, list(y))


if __name__ == "__main__":
    main()
