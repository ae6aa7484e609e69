"""The fragment form of a 2:4 weight: what each lane of a warp feeds to `mma.sp.m16n8k32`.

A tile is 16 rows by 32 columns. With g = lane // 4 and t = lane % 4, the PTX ISA ("Matrix fragments
for sparse mma.m16n8k32", 16-bit types) gives a lane these registers, two values each:

    0  row g      compressed columns 2t, 2t + 1        2  row g      compressed columns 2t + 8, 2t + 9
    1  row g + 8  the same columns                     3  row g + 8  the same columns

and, with sparsity selector F, takes the metadata of columns 0 to 15 from lane t = 2F and of columns 16
to 31 from lane t = 2F + 1: row g in the low half of the word, row g + 8 in the high half, 4 bits for
each group of four. So one word a lane serves two tiles that follow each other along the columns.

    values  [rows / 16, columns / 32, 32 lanes, 8]         of the dtype of the weight
    codes   int32 [rows / 16, columns / 256, 32 lanes, 4]  word j: tiles 2j and 2j + 1 of the eight

Rows and columns are rounded up; what is added holds zeros under a valid code. Both tensors are
read 16 bytes a lane, a warp's 512 bytes in one piece.
"""

from __future__ import annotations

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import SemiStructuredWeight, codes_from_nibbles

ROWS = 16
COLUMNS = 32
TILES = 8
"""Tiles along the columns whose metadata one 16-byte read of a lane brings."""
LANES = 32
FIRST_TWO = 0b0100
"""The code of a group that keeps its columns 0 and 1."""


def fragment_shapes(rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of values and codes of a weight [rows, columns]."""
    row_tiles, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    return (row_tiles, steps, LANES, 8), (row_tiles, -(-steps // TILES), LANES, 4)


def to_fragments(weight: SemiStructuredWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns values and codes in fragment form, on the device of the weight.

    Raises:
        LoweringError: The values do not have 16 bits.
    """
    if weight.values.element_size() != 2:
        raise LoweringError(
            f"fragments of {weight.values.dtype} values",
            where="the fragment form",
            next_step="store float16 or bfloat16 values",
        )
    values_shape, codes_shape = fragment_shapes(weight.rows, weight.columns)
    row_tiles, steps = values_shape[:2]
    device = weight.values.device
    pairs = torch.zeros(row_tiles * ROWS, steps * 8, dtype=torch.int32, device=device)
    pairs[: weight.rows, : weight.columns // 4] = weight.values.contiguous().view(torch.int32)
    # [row tile, upper or lower 8 rows, g, step, lower or upper 16 columns, t]
    pairs = pairs.view(row_tiles, 2, 8, steps, 2, 4)
    values = pairs.permute(0, 3, 2, 5, 4, 1).reshape(row_tiles, steps, LANES, 4)

    chunks = codes_shape[1]
    nibbles = torch.full(
        (row_tiles * ROWS, chunks * TILES * 8), FIRST_TWO, dtype=torch.int32, device=device
    )
    nibbles[: weight.rows, : weight.columns // 4] = weight.nibbles().int()
    places = 4 * torch.arange(4, dtype=torch.int32, device=device)
    halves = (nibbles.view(-1, chunks * TILES, 2, 4) << places).sum(-1, dtype=torch.int32)
    halves = halves.view(row_tiles, 2, 8, chunks, 4, 2, 2)
    # [row tile, g, chunk, word j, selector F, columns' half]
    words = halves[:, 0] | (halves[:, 1] << 16)
    codes = words.permute(0, 2, 1, 4, 5, 3).reshape(codes_shape)
    return values.contiguous().view(weight.values.dtype), codes.contiguous()


def from_fragments(
    values: torch.Tensor, codes: torch.Tensor, rows: int, columns: int
) -> SemiStructuredWeight:
    """Returns the canonical form of what `to_fragments` made.

    Args:
        values: [rows / 16, columns / 32, 32, 8].
        codes: int32 [rows / 16, columns / 256, 32, 4].
        rows: The true number.
        columns: The true number, a multiple of 4.

    Raises:
        LoweringError: The shapes do not belong to such a weight.
    """
    values_shape, codes_shape = fragment_shapes(rows, columns)
    if tuple(values.shape) != values_shape or tuple(codes.shape) != codes_shape:
        raise LoweringError(
            f"fragments {tuple(values.shape)} with codes {tuple(codes.shape)} do not hold a "
            f"{rows} x {columns} weight, which takes {values_shape} and {codes_shape}",
            where="the fragment form",
            next_step="make both by to_fragments from one weight",
        )
    row_tiles, steps = values_shape[:2]
    pairs = values.contiguous().view(torch.int32).view(row_tiles, steps, 8, 4, 2, 2)
    pairs = pairs.permute(0, 5, 2, 1, 4, 3).reshape(row_tiles * ROWS, steps * 8)
    kept = pairs[:rows, : columns // 4].contiguous().view(values.dtype)

    chunks = codes_shape[1]
    words = codes.view(row_tiles, chunks, 8, 2, 2, 4).permute(0, 2, 1, 5, 3, 4)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 1)
    places = 4 * torch.arange(4, dtype=torch.int32, device=codes.device)
    nibbles = ((halves.reshape(row_tiles * ROWS, -1, 1) >> places) & 0xF).to(torch.uint8)
    nibbles = nibbles.reshape(row_tiles * ROWS, -1)[:rows, : columns // 4]
    return SemiStructuredWeight(kept, codes_from_nibbles(nibbles))
