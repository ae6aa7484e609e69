"""The bitmap format: what is packed comes out again, and what cannot be stored is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroskip.ir import bitmap
from zeroskip.ir.bitmap import PADDING, SEGMENT, BitmapWeight, pack_bitmap, unpack_words
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import VALUE_DTYPES


def random_weight(
    rows: int, columns: int, density: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def test_the_layout_is_the_documented_one() -> None:
    weight = torch.zeros(2, 70)
    weight[0, 0], weight[0, 31], weight[0, 33] = 1.0, 2.0, 3.0
    weight[0, 65], weight[1, 3], weight[1, 69] = 4.0, 5.0, 6.0
    packed = pack_bitmap(weight)
    assert packed.bits.tolist() == [[1 - 2**31, 2, 2, 0], [8, 0, 32, 0]]
    assert packed.starts.tolist() == [[0, 3], [4, 5]]
    assert packed.values.tolist() == [1, 2, 3, 4, 5, 6] + [0] * 64
    assert (packed.rows, packed.columns, packed.kept) == (2, 70, 6)
    assert packed.nbytes == 8 * 4 + 4 * 4 + 70 * 4


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 200),
    density=st.floats(0, 1),
    dtype=st.sampled_from(VALUE_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_a_round_trip_of_any_weight(
    rows: int, columns: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    weight = random_weight(rows, columns, density, dtype, seed)
    packed = pack_bitmap(weight)
    segments = -(-columns // SEGMENT)
    assert packed.bits.dtype == packed.starts.dtype == torch.int32
    assert packed.bits.shape == (rows, 2 * segments)
    assert packed.starts.shape == (rows, segments)
    assert packed.values.shape == (int(weight.count_nonzero()) + PADDING,)
    assert packed.values.dtype == dtype
    assert not packed.values[packed.kept :].any()
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.keep(), weight != 0)
    assert not unpack_words(packed.bits)[:, columns:].any()
    for row in range(rows):
        for segment in range(segments):
            part = weight[row, SEGMENT * segment : SEGMENT * (segment + 1)]
            start = int(packed.starts[row, segment])
            kept = part[part != 0]
            assert torch.equal(packed.values[start : start + len(kept)], kept)


def test_a_mask_keeps_zeros_and_drops_weights() -> None:
    weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    keep = random_weight(4, 70, seed=1) != 0
    weight[~keep] = float("nan")  # What is pruned does not matter.
    weight[0, :9] = 0.0
    packed = pack_bitmap(weight.T.contiguous().T.requires_grad_(), keep)
    assert torch.equal(packed.keep(), keep)
    assert torch.equal(packed.unpack(), weight.masked_fill(~keep, 0))
    assert not packed.values.requires_grad


def test_what_cannot_be_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(4, 70)
    with pytest.raises(LoweringError, match=r"torch\.float64 \(4, 70\)"):
        pack_bitmap(weight.double())
    with pytest.raises(LoweringError, match=r"\(1, 4, 70\)"):
        pack_bitmap(weight[None])
    for keep in (weight.T != 0, (weight != 0).byte()):
        with pytest.raises(LoweringError, match="the mask is"):
            pack_bitmap(weight, keep)
    kept = int(weight.count_nonzero())
    monkeypatch.setattr(bitmap, "MOST_KEPT", kept)
    assert pack_bitmap(weight).kept == kept
    monkeypatch.setattr(bitmap, "MOST_KEPT", kept - 1)
    with pytest.raises(LoweringError, match=f"{kept} weights are kept, the format counts to"):
        pack_bitmap(weight)


def test_the_limit_is_that_of_the_starts() -> None:
    assert torch.iinfo(torch.int32).max == bitmap.MOST_KEPT


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_kept_value_that_is_not_finite_is_refused(value: float) -> None:
    weight = random_weight(4, 70)
    weight[2, 3] = value
    with pytest.raises(LoweringError, match="not finite"):
        pack_bitmap(weight)


def test_tensors_that_contradict_each_other_are_refused() -> None:
    packed = pack_bitmap(random_weight(4, 70))
    more, beyond, other = packed.bits.clone(), packed.bits.clone(), packed.starts.clone()
    more[1, 0] ^= 1
    beyond[1, 3] = 1
    other[1, 1] += 1
    wrong: list[BitmapWeight] = [
        dataclasses.replace(packed, bits=more),
        dataclasses.replace(packed, bits=beyond),
        dataclasses.replace(packed, starts=other),
        dataclasses.replace(packed, values=packed.values[1:]),
        dataclasses.replace(packed, columns=60),
    ]
    for weight in wrong:
        with pytest.raises(LoweringError, match="bits"):
            weight.unpack()
