"""Weights that contradict themselves: a message, never a crash or a wrong answer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.cpu import check, library, random_weight
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import PADDING, BitmaskWeight, pack_bitmask
from zeroskip.runtime.kernels.library import MESSAGE_SIZE, CpuLinear, _Weight

Change = Callable[[BitmaskWeight], BitmaskWeight]
LARGEST = 2**63 - 1


def offsets(**at: int) -> Change:
    """Sets row offsets; `_2=5` makes the third one 5."""

    def change(weight: BitmaskWeight) -> BitmaskWeight:
        changed = weight.row_offsets.clone()
        for index, value in at.items():
            changed[int(index[1:])] = value
        return replace(weight, row_offsets=changed)

    return change


def bit(row: int, byte: int, value: int) -> Change:
    def change(weight: BitmaskWeight) -> BitmaskWeight:
        changed = weight.bitmask.clone()
        changed[row, byte] ^= value
        return replace(weight, bitmask=changed)

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "first offset": (offsets(_0=1), "row_offsets"),
    "offset too small": (offsets(_2=0), "row 1 keeps"),
    "negative offset": (offsets(_3=-1), "row 2 keeps"),
    "most negative offset": (offsets(_1=-LARGEST - 1), "row 0 keeps"),
    "largest offset": (offsets(_6=LARGEST), "row 5 keeps"),
    "a kept weight more": (bit(3, 4, 1), "row 3 keeps"),
    "a bit beyond the columns": (bit(0, 15, 128), "row 0"),
    "values cut": (lambda w: replace(w, values=w.values[:-1].clone()), "values"),
    "no values": (lambda w: replace(w, values=w.values[:0].clone()), "missing|values"),
    "offsets cut": (lambda w: replace(w, row_offsets=w.row_offsets[:-1].clone()), "row offsets"),
    "bitmask narrow": (lambda w: replace(w, bitmask=w.bitmask[:, :8].contiguous()), "bitmask"),
    "columns fewer": (lambda w: replace(w, columns=64), "bitmask"),
    "columns more": (lambda w: replace(w, columns=129), "bitmask"),
    "columns fewer, same words": (lambda w: replace(w, columns=65), "beyond"),
    "negative columns": (lambda w: replace(w, columns=-1), "columns"),
    "columns overflow": (lambda w: replace(w, columns=LARGEST), "too large"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CHANGES)
def test_arrays_that_contradict_each_other(name: str, dtype: str) -> None:
    change, message = CHANGES[name]
    # Column 32 of row 3 is pruned, column 99 of row 0 kept.
    weight = random_weight(6, 100, 0.5, dtype, seed=2)
    keep = weight.keep()
    weight = _with_mask(weight, keep)
    with pytest.raises(LoweringError, match=message):
        CpuLinear(library(), change(weight))


def _with_mask(weight: BitmaskWeight, keep: torch.Tensor) -> BitmaskWeight:
    keep = keep.clone()
    keep[3, 32], keep[0, 99] = False, True
    dense = torch.ones_like(keep, dtype=torch.float32)
    return pack_bitmask(dense, keep, dtype=weight.values.dtype, scales=weight.scales)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite(scale: float) -> None:
    weight = random_weight(3, 100, 0.5, "int8")
    assert weight.scales is not None
    weight.scales[1] = scale
    with pytest.raises(LoweringError, match="scale 1 is not finite"):
        CpuLinear(library(), weight)


def test_scales_of_another_shape() -> None:
    weight = random_weight(3, 200, 0.5, "int8", 64)
    assert weight.scales is not None
    with pytest.raises(LoweringError, match="scales"):
        CpuLinear(library(), replace(weight, scales=weight.scales[:, :3].contiguous()))
    with pytest.raises(LoweringError, match="scales"):
        CpuLinear(library(), replace(weight, scales=None))
    with pytest.raises(LoweringError, match="multiple of 64"):
        CpuLinear(library(), replace(weight, block_size=32))
    with pytest.raises(LoweringError, match="multiple of 64"):
        CpuLinear(library(), replace(weight, block_size=-64))


def test_blocks_and_scales_without_int8() -> None:
    """A block smaller than a word of the bitmask once divided by zero here."""
    weight = random_weight(3, 200, 0.5, "float32")
    for block_size in (5, 64, -1):
        with pytest.raises(LoweringError, match="int8"):
            CpuLinear(library(), replace(weight, block_size=block_size))
    with pytest.raises(LoweringError, match="int8"):
        CpuLinear(library(), replace(weight, scales=torch.ones(3, 1)))


def raw(weight: BitmaskWeight, **fields: Any) -> str:
    """What the C interface says to a weight with some fields replaced; empty when it accepts."""
    view = _Weight(
        rows=weight.rows,
        columns=weight.columns,
        bitmask=weight.bitmask.data_ptr(),
        bitmask_count=weight.bitmask.numel() // 8,
        row_offsets=weight.row_offsets.data_ptr(),
        row_offsets_count=weight.row_offsets.numel(),
        values=weight.values.data_ptr(),
        values_count=weight.values.numel(),
        value_type=0,
    )
    for name, value in fields.items():
        setattr(view, name, value)
    handle, message = ctypes.c_void_p(), ctypes.create_string_buffer(MESSAGE_SIZE)
    if library().zs_linear_create(ctypes.byref(view), None, ctypes.byref(handle), message):
        assert not handle.value
        return message.value.decode()
    library().zs_linear_destroy(handle)
    return ""


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rows", (-1, 2, 4, 2**40, 2**62, LARGEST, -LARGEST - 1)),
        ("columns", (-1, 0, 64, 129, 2**40, 2**62, LARGEST, -LARGEST - 1)),
        ("bitmask_count", (-1, 0, 5, 7, LARGEST)),
        ("row_offsets_count", (-1, 0, 3, 5, LARGEST)),
        ("values_count", (-1, 0, 1, -LARGEST - 1)),
        ("value_type", (-1, 3, 4, 2**31 - 1, -(2**31))),
        ("bitmask", (None,)),
        ("row_offsets", (None,)),
        ("values", (None,)),
    ],
)
def test_numbers_of_the_interface(field: str, values: tuple[Any, ...]) -> None:
    weight = random_weight(3, 100, 0.5, "float32")
    assert raw(weight) == ""
    for value in values:
        assert raw(weight, **{field: value}), value


def test_sizes_whose_product_overflows() -> None:
    weight = random_weight(3, 100, 0.5, "float32")
    assert "too large" in raw(weight, rows=2**40, columns=2**40)
    # 2^32 * 2^32 is 0 in 64 bits.
    assert "too large" in raw(weight, rows=2**32, columns=2**32, bitmask_count=0)


@pytest.mark.parametrize("field", ["bitmask", "row_offsets", "values"])
def test_misaligned_arrays(field: str) -> None:
    weight = random_weight(3, 100, 0.5, "float32")
    address = getattr(weight, field).data_ptr()
    assert "aligned" in raw(weight, **{field: address + 1})
    assert "aligned" in raw(weight, **{field: address + 2})


def test_more_elements_than_31_bits_count() -> None:
    """Rows * columns beyond 2^31 and a bitmask beyond 2^28 bytes, with almost nothing kept."""
    rows, columns = 70_000, 40_000
    words = columns // 64
    bitmask = torch.zeros(rows, words * 8, dtype=torch.uint8)
    bitmask[0, 0] = 1
    bitmask[rows - 1, words * 8 - 1] = 128
    row_offsets = torch.ones(rows + 1, dtype=torch.int64)
    row_offsets[0], row_offsets[rows] = 0, 2
    values = torch.zeros(2 + PADDING)
    values[0], values[1] = 3, 5
    weight = BitmaskWeight(bitmask, row_offsets, values, None, columns)
    linear = CpuLinear(library(), weight)
    x = torch.arange(columns, dtype=torch.float32).expand(2, columns) + 1
    y = linear(x)
    assert y[0, 0] == 3
    assert y[1, rows - 1] == 5 * columns
    assert y.count_nonzero() == 4


def test_garbage_behind_the_values_is_not_used() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        weight = random_weight(5, 130, 0.5, dtype)
        weight.values[weight.kept :] = torch.nan
        x = torch.randn(20, 130)
        check(CpuLinear(library(), weight)(x), weight, x, None, 0, dtype)
