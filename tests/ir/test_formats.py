"""The bitmask format: what is packed comes out again, and what cannot be stored is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import (
    PADDING,
    PackedValues,
    Rounded,
    ValueFormat,
    count_blocks,
    pack_bitmask,
    spread_scales,
)
from zeroskip.ir.weights import InMemory

SHAPES = [(1, 1), (3, 64), (5, 65), (4, 128), (7, 200), (0, 8), (3, 0)]


def random_weight(rows: int, columns: int, density: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_come_out_as_they_were_rounded(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = random_weight(rows, columns)
    packed = pack_bitmask(weight, dtype=dtype)
    assert packed.bitmask.shape == (rows, -(-columns // 64) * 8)
    assert packed.values.shape == (int(weight.count_nonzero()) + PADDING,)
    assert packed.kept == int(weight.count_nonzero())
    assert torch.equal(packed.unpack(), weight.to(dtype).float())
    assert torch.equal(packed.keep(), weight != 0)


def test_the_layout_is_the_documented_one() -> None:
    weight = torch.zeros(2, 70)
    weight[0, 0], weight[0, 9], weight[1, 69] = 1.0, 2.0, 3.0
    packed = pack_bitmask(weight)
    assert packed.bitmask.tolist() == [[1, 2] + [0] * 14, [0] * 8 + [1 << 5] + [0] * 7]
    assert packed.row_offsets.tolist() == [0, 2, 3]
    assert packed.values[:3].tolist() == [1.0, 2.0, 3.0]
    assert not packed.values[3:].any()


@pytest.mark.parametrize("block_size", [0, 64, 128])
def test_int8_values_are_weights_over_scales(block_size: int) -> None:
    weight = random_weight(6, 200)
    scales = torch.rand(6, count_blocks(200, block_size)) * 0.02 + 0.02
    packed = pack_bitmask(weight, dtype=torch.int8, scales=scales, block_size=block_size)
    steps = spread_scales(scales, 200, block_size).expand(6, 200)
    expected = (weight / steps).round().clamp(-127, 127) * steps
    assert torch.equal(packed.unpack(), expected)
    assert packed.nbytes == 6 * 32 + 7 * 8 + packed.kept + PADDING + scales.numel() * 4


def test_a_mask_keeps_zeros_and_drops_weights() -> None:
    weight = random_weight(4, 64)
    keep = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_bitmask(weight, keep)
    assert torch.equal(packed.keep(), keep)
    assert torch.equal(packed.unpack(), weight * keep)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 200),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_round_trip_of_any_weight(rows: int, columns: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    packed = pack_bitmask(weight)
    assert torch.equal(packed.unpack(), weight)
    assert int(packed.row_offsets[-1]) == packed.kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_kept_value_that_is_not_finite_is_refused(value: float) -> None:
    weight = random_weight(4, 64)
    weight[2, 3] = value
    with pytest.raises(LoweringError, match="not finite"):
        pack_bitmask(weight)
    keep = torch.ones(4, 64, dtype=torch.bool)
    keep[2, 3] = False  # What is pruned does not matter.
    assert pack_bitmask(weight, keep).kept == 255


def test_what_cannot_be_stored_is_refused() -> None:
    weight = random_weight(4, 64)
    with pytest.raises(LoweringError, match="does not fit into float16"):
        pack_bitmask(weight * 1e6, dtype=torch.float16)
    with pytest.raises(LoweringError, match="need scales"):
        pack_bitmask(weight, dtype=torch.int8)
    with pytest.raises(LoweringError, match="need scales"):
        pack_bitmask(weight, dtype=torch.int8, scales=torch.ones(4, 2))
    with pytest.raises(LoweringError, match="not positive and finite"):
        pack_bitmask(weight, dtype=torch.int8, scales=torch.zeros(4, 1))
    with pytest.raises(LoweringError, match="scales go with int8"):
        pack_bitmask(weight, scales=torch.ones(4, 1))
    for block_size in (-64, 32, 65):
        with pytest.raises(LoweringError, match="multiple of 64"):
            count_blocks(128, block_size)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_rounded_weight_is_what_its_values_hold(
    dtype: str, transposed: bool, stored: torch.dtype
) -> None:
    weight = random_weight(6, 130)
    scales = weight.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else None
    form = ValueFormat(dtype, scales)
    source = InMemory((weight.T.contiguous() if transposed else weight).to(stored))
    rounded = Rounded(source, form, transposed)
    once = rounded.load()
    assert (rounded.shape, rounded.dtype) == (source.shape, stored)
    assert torch.equal(Rounded(InMemory(once), form, transposed).load(), once)
    view = once.T if transposed else once
    packed = form.pack(view)
    assert torch.equal(packed.unpack().to(stored), view)
    values = PackedValues(rounded, form, transposed, packed.kept)
    assert (values.shape, values.dtype) == (packed.values.shape, packed.values.dtype)
    assert torch.equal(values.load(), packed.values)


def test_packed_values_notice_that_the_weight_has_changed() -> None:
    weight = random_weight(6, 130)
    kept = int(weight.count_nonzero())
    source = InMemory(torch.ones(6, 130))
    with pytest.raises(LoweringError, match="lower again"):
        PackedValues(source, ValueFormat("float32"), False, kept).load()
