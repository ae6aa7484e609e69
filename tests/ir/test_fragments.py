"""Fragments of a 2:4 weight, against a lane-by-lane model of `mma.sp.m16n8k32`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.fragments import fragment_shapes, from_fragments, to_fragments
from zeroskip.ir.semi_structured import SemiStructuredWeight, pack_semi_structured

SHAPES = [(16, 32), (1, 4), (5, 36), (48, 1024), (33, 544), (72, 8), (16, 256)]
DTYPES = [torch.float16, torch.bfloat16]


def make_weight(rows: int, columns: int, dtype: torch.dtype) -> SemiStructuredWeight:
    """A random weight with groups that keep no, one and two values."""
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, columns // 4, 4)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.scatter_(2, torch.rand_like(weight).topk(2, -1).indices, True)
    weight = weight * keep
    weight[::3, 0] = 0
    weight[::5, -1, 0] = 0
    return pack_semi_structured(weight.view(rows, columns).to(dtype))


def multiply_as_lanes(
    a: torch.Tensor, b: torch.Tensor, words: torch.Tensor, selector: int
) -> torch.Tensor:
    """What the instruction computes from the registers of 32 lanes, by the tables of the PTX ISA.

    Args:
        a: [32, 4, 2]: four registers of two values.
        b: [32, 4, 2].
        words: [32] metadata.
        selector: 0 or 1.

    Returns:
        [16, 8], float64.
    """
    dense, columns = torch.zeros(16, 32).double(), torch.zeros(32, 8).double()
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for register in range(4):
            for half in range(2):
                columns[8 * register + 2 * t + half, g] = b[lane, register, half].double()
            row, group = g + 8 * (register % 2), t + 4 * (register // 2)
            # Columns 0 to 15 are described by the first lane of the pair, 16 to 31 by the second.
            word = int(words[4 * g + 2 * selector + group // 4]) & 0xFFFFFFFF
            code = word >> (16 * (register % 2) + 4 * (group % 4)) & 0xF
            first, second = code & 3, code >> 2
            assert first < second, "hardware has no meaning for this"
            dense[row, 4 * group + first] += a[lane, register, 0].double()
            dense[row, 4 * group + second] += a[lane, register, 1].double()
    return dense @ columns


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (5, 36), (33, 544), (16, 256)])
def test_instruction_multiplies(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = make_weight(rows, columns, dtype)
    values, codes = to_fragments(weight)
    tiles, steps = values.shape[:2]
    x = torch.randn(8, columns).to(dtype)
    padded = torch.zeros(8, steps * 32, dtype=dtype)
    padded[:, :columns] = x
    found = torch.zeros(tiles * 16, 8).double()
    lanes = torch.arange(32)
    for tile in range(tiles):
        for step in range(steps):
            # Register r of lane 4g + t: tokens g, columns 8r + 2t and the next.
            at = step * 32 + 8 * torch.arange(4)[None, :, None] + torch.arange(2)
            at = at + 2 * (lanes % 4)[:, None, None]
            b = padded[(lanes // 4)[:, None, None], at]
            a = values[tile, step].view(32, 4, 2)
            words = codes[tile, step // 8, :, step % 8 // 2]
            found[tile * 16 : tile * 16 + 16] += multiply_as_lanes(a, b, words, step % 2)
    expected = weight.unpack().double() @ x.double().T
    torch.testing.assert_close(found[:rows], expected)
    assert not found[rows:].any(), "added rows hold zeros"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_round_trip(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = make_weight(rows, columns, dtype)
    values, codes = to_fragments(weight)
    assert (tuple(values.shape), tuple(codes.shape)) == fragment_shapes(rows, columns)
    again = from_fragments(values, codes, rows, columns)
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.codes, weight.codes)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 80))
def test_round_trip_of_any_size(rows: int, groups: int) -> None:
    weight = make_weight(rows, 4 * groups, torch.bfloat16)
    again = from_fragments(*to_fragments(weight), rows, 4 * groups)
    assert torch.equal(again.unpack(), weight.unpack())


def test_what_is_added_has_valid_codes() -> None:
    _, codes = to_fragments(make_weight(1, 4, torch.float16))
    words = codes.to(torch.int64) & 0xFFFFFFFF
    nibbles = (words[..., None] >> (4 * torch.arange(8))) & 0xF
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def test_bytes_are_nine_sixteenths() -> None:
    weight = make_weight(64, 512, torch.bfloat16)
    sizes = sum(part.numel() * part.element_size() for part in to_fragments(weight))
    assert sizes == 64 * 512 * 2 * 9 // 16


def test_float32_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"(?s)float32.*store float16 or bfloat16"):
        to_fragments(pack_semi_structured(torch.eye(4)))


@pytest.mark.parametrize("rows", [15, 33])
def test_other_sizes_are_refused(rows: int) -> None:
    values, codes = to_fragments(make_weight(16 if rows < 16 else 32, 64, torch.float16))
    with pytest.raises(LoweringError, match="do not hold a"):
        from_fragments(values, codes, rows + 16, 64)
