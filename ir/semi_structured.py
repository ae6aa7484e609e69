"""The 2:4 format: two of every four consecutive weights along the input dimension are kept.

    values  [rows, columns / 2]: the kept weights of each group, in column order
    codes   uint8 [rows, ceil(columns / 8)]: where they were, 4 bits a group, two groups a byte

The code of a group is i0 | i1 << 2 with columns i0 < i1; the first group of a byte is in its low
bits, and where the number of groups is odd the last high bits are 0b0100. A group with fewer than
two weights that are not zero keeps zeros as well, in its lowest free columns: hardware has no
meaning for a group that names one column twice.

No architecture is in here: what a kernel or a library wants is made from this when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import all_finite, zero_outside

GROUP = 4
EMPTY = 0b0100
"""The code of a group without weights: columns 0 and 1."""
VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_TOO_MANY = 0xFF
_CUTLASS_TILE = 32


@dataclass(frozen=True, eq=False)
class SemiStructuredWeight:
    """A weight [rows, columns] in the 2:4 format; the module says what the tensors hold.

    Raises:
        LoweringError: The tensors are not of the shapes and dtypes that go together.
    """

    values: torch.Tensor
    codes: torch.Tensor

    def __post_init__(self) -> None:
        values, codes = self.values, self.codes
        if values.dim() != 2 or values.shape[1] % 2 or values.dtype not in VALUE_DTYPES:
            raise _broken(f"values are {values.dtype} {tuple(values.shape)}")
        expected = (values.shape[0], -(-values.shape[1] // 4))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
            raise _broken(
                f"codes are {codes.dtype} {tuple(codes.shape)}, "
                f"values {tuple(values.shape)} need torch.uint8 {expected}"
            )
        if codes.device != values.device:
            raise _broken(f"codes are on {codes.device}, values on {values.device}")

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return 2 * self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """The size of both tensors, in bytes."""
        return sum(part.numel() * part.element_size() for part in (self.values, self.codes))

    def nibbles(self) -> torch.Tensor:
        """Returns the code of every group in a byte of its own, uint8 [rows, columns / 4]."""
        return spread_codes(self.codes, self.columns // GROUP)

    def keep(self) -> torch.Tensor:
        """Returns which weights have a value, bool [rows, columns]: two of each group, always.

        Raises:
            LoweringError: A code names no two columns in order.
        """
        first, second = self._places()
        return ((first == _places_of(first)) | (second == _places_of(second))).flatten(1)

    def unpack(self) -> torch.Tensor:
        """Returns the weight [rows, columns], of the dtype of the values.

        Raises:
            LoweringError: A code names no two columns in order.
        """
        first, second = self._places()
        pairs = self.values.reshape(self.rows, self.columns // GROUP, 2)
        zero = self.values.new_zeros(())
        # Comparisons, not a scatter: its 64-bit indices would be four times the weight.
        late = torch.where(second == _places_of(second), pairs[..., 1:], zero)
        return torch.where(first == _places_of(first), pairs[..., :1], late).flatten(1)

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the two columns of every group, uint8 [rows, columns / 4, 1] each."""
        check_codes(self.codes)
        nibbles = self.nibbles()[..., None]
        return nibbles & 3, nibbles >> 2


def pack_semi_structured(
    weight: torch.Tensor, keep: torch.Tensor | None = None
) -> SemiStructuredWeight:
    """Packs a weight, on the device that it is on.

    Args:
        weight: [rows, columns] of float32, float16 or bfloat16, which the values keep.
        keep: bool [rows, columns], at most two in a group; by default what is not zero.

    Raises:
        LoweringError: The weight is no such matrix, a group keeps more than two weights, or a kept
            weight is not finite.
    """
    keep = _check_weight(weight, keep)
    rows, columns = weight.shape
    shape = (rows, columns // GROUP, GROUP)
    kept = keep.reshape(shape).to(torch.uint8).unbind(-1)
    pattern = kept[0] | kept[1] << 1 | kept[2] << 2 | kept[3] << 3
    table = torch.tensor(_CODE_OF_PATTERN, dtype=torch.uint8, device=weight.device)
    nibbles = table.index_select(0, pattern.flatten().int()).view(shape[:2])
    _check_counts(nibbles, columns)
    zeroed = zero_outside(weight, keep)
    w0, w1, w2, w3 = zeroed.view(shape).unbind(-1)
    first, second = nibbles & 3, nibbles >> 2
    early = torch.where(first == 0, w0, torch.where(first == 1, w1, w2))
    late = torch.where(second == 1, w1, torch.where(second == 2, w2, w3))
    values = torch.stack([early, late], dim=-1).view(rows, columns // 2)
    codes = codes_from_nibbles(nibbles)
    if not all_finite(values):
        row, place = (~values.isfinite()).nonzero()[0].tolist()
        column = int(kept_columns(codes[row : row + 1], columns)[0, place])
        raise LoweringError(
            f"a kept weight is not finite, in row {row}, column {column}",
            next_step="repair the checkpoint",
        )
    return SemiStructuredWeight(values, codes)


def codes_from_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """Packs codes of a byte each, uint8 [rows, groups], into two a byte."""
    even = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2), value=EMPTY)
    return even[:, ::2] | even[:, 1::2] << 4


def spread_codes(codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns packed codes in a byte each: the inverse of `codes_from_nibbles`."""
    both = torch.stack([codes & 0xF, codes >> 4], dim=-1)
    return both.flatten(1)[:, :groups].contiguous()


def kept_columns(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns the column of every value, int64 [rows, columns / 2]; codes are not checked."""
    nibbles = spread_codes(codes, columns // GROUP)
    within = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    starts = torch.arange(0, columns, GROUP, device=codes.device)
    return (within + starts[:, None]).flatten(1)


def check_codes(codes: torch.Tensor) -> None:
    """Refuses codes, two a byte, that name no two columns in order.

    Raises:
        LoweringError: Says how many, and where the first is.
    """
    wrong = torch.stack(
        [(part & 3) >= (part >> 2) for part in (codes & 0xF, codes >> 4)], dim=-1
    ).flatten(1)
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        code = int(codes[row, group // 2]) >> group % 2 * 4 & 0xF
        raise _broken(
            f"{int(wrong.sum())} codes name no two columns in order, "
            f"the first in row {row}, group {group}: {code:04b}"
        )


def to_cutlass(weight: SemiStructuredWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a weight as the sparse kernels of CUTLASS and PyTorch want it, for sm80 and later.

    The same as `torch.sparse` makes of the dense weight where every group has two weights that are
    not zero; where a group has fewer, PyTorch keeps other zeros.

    Args:
        weight: Of float16 or bfloat16; rows and columns are multiples of 32.

    Returns:
        The values, and the metadata int16 [rows, columns / 16]: each 32 x 32 tile is 32 words of 32
        bits, one for each lane; rows g and g + 8 of a 16-row half share a word.

    Raises:
        LoweringError: The dtype or the shape is another. In float32 that hardware keeps one of two.
    """
    rows, columns = weight.rows, weight.columns
    _check_cutlass(weight.values.dtype, rows, columns)
    low, high = weight.codes.to(torch.int32).view(rows, -1, 2).unbind(-1)
    quads = (low | high << 8).to(torch.int16)
    tiles = quads.view(rows // 32, 2, 2, 8, columns // 32, 2).permute(4, 0, 3, 1, 5, 2)
    return weight.values, tiles.reshape(rows, columns // 16)


def from_cutlass(values: torch.Tensor, meta: torch.Tensor) -> SemiStructuredWeight:
    """Reads what `to_cutlass`, or `torch.sparse`, made.

    Raises:
        LoweringError: The shapes or dtypes are others, or a code names no two columns in order.
    """
    if values.dim() != 2:
        raise _broken(f"values are {values.dtype} {tuple(values.shape)}")
    rows, columns = values.shape[0], 2 * values.shape[1]
    _check_cutlass(values.dtype, rows, columns)
    if meta.dtype != torch.int16 or tuple(meta.shape) != (rows, columns // 16):
        raise _broken(
            f"metadata is {meta.dtype} {tuple(meta.shape)}, not torch.int16 {(rows, columns // 16)}"
        )
    tiles = meta.reshape(columns // 32, rows // 32, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4)
    quads = tiles.reshape(rows, columns // 16).to(torch.int32)
    codes = torch.stack([quads & 0xFF, quads >> 8 & 0xFF], dim=-1).to(torch.uint8).flatten(1)
    check_codes(codes)
    return SemiStructuredWeight(values, codes)


def _code_table() -> list[int]:
    """The code of each of the 16 patterns of kept columns, column 0 in the lowest bit."""
    table = []
    for pattern in range(16):
        kept = [column for column in range(GROUP) if pattern >> column & 1]
        free = [column for column in range(GROUP) if column not in kept]
        first, second, *more = sorted(kept + free[: max(0, 2 - len(kept))])
        assert first < second
        table.append(_TOO_MANY if more else first | second << 2)
    return table


_CODE_OF_PATTERN = _code_table()


def _places_of(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(GROUP, dtype=torch.uint8, device=like.device)


def _check_weight(weight: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Returns the mask, given or by default; refuses a weight that no codes can describe."""
    if weight.dim() != 2:
        raise LoweringError(
            f"a weight of {weight.dim()} dimensions, {tuple(weight.shape)}",
            next_step="pack matrices, one for each expert",
        )
    if weight.dtype not in VALUE_DTYPES:
        raise LoweringError(
            f"a weight of {weight.dtype}", next_step="convert it to float32, float16 or bfloat16"
        )
    if weight.shape[1] % GROUP:
        raise LoweringError(
            f"{weight.shape[1]} columns are not a multiple of 4", next_step="leave it dense"
        )
    if keep is None:
        return weight.detach() != 0
    if keep.dtype != torch.bool or keep.shape != weight.shape:
        raise LoweringError(
            f"the mask is {keep.dtype} {tuple(keep.shape)}, the weight {tuple(weight.shape)}",
            next_step="pass a boolean mask of the shape of the weight",
        )
    return keep


def _check_counts(nibbles: torch.Tensor, columns: int) -> None:
    wrong = nibbles == _TOO_MANY
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise LoweringError(
            f"{int(wrong.sum())} of {nibbles.numel()} groups keep more than 2 of 4 weights, the "
            f"first in row {row}, columns {GROUP * group} to {GROUP * group + GROUP - 1}",
            next_step="prune to 2:4 along the input dimension first",
        )


def _check_cutlass(dtype: torch.dtype, rows: int, columns: int) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise LoweringError(
            f"values of {dtype}: the hardware keeps two of four in 16 bits, one of two in 32",
            next_step="convert the weight to float16 or bfloat16",
        )
    if rows % _CUTLASS_TILE or columns % _CUTLASS_TILE:
        raise LoweringError(
            f"{rows} rows and {columns} columns are not multiples of {_CUTLASS_TILE}",
            next_step="pad the dense weight with zeros",
        )


def _broken(problem: str) -> LoweringError:
    return LoweringError(problem, where="a 2:4 weight", next_step="pack the dense weight again")
