"""The bitmap format: an unstructured weight as GPUs read it, in segments of 64 columns.

    bits    int32 [rows, 2 * ceil(columns / 64)]: bit j of word w keeps column 32 w + j
    starts  int32 [rows, ceil(columns / 64)]: where the values of each segment begin
    values  [kept + 64]: the kept values, row after row, then 64 zeros

A thread that owns a segment finds its values without a sum over the row; that is what this has over
`zeroskip.ir.formats`, whose kernels walk through whole rows. The 64 zeros let a kernel read past the
last segment's values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import VALUE_DTYPES
from zeroskip.ir.weights import all_finite, pack_bits, unpack_bits

SEGMENT = 64
PADDING = 64
MOST_KEPT = 2**31 - 1
"""Starts have 32 bits."""


@dataclass(frozen=True, eq=False)
class BitmapWeight:
    """A weight [rows, columns] in the bitmap format; the module says what the tensors hold.

    Args:
        columns: The true width; the bits are wider by less than 64.
    """

    bits: torch.Tensor
    starts: torch.Tensor
    values: torch.Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.bits.shape[0]

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return self.values.shape[0] - PADDING

    @property
    def nbytes(self) -> int:
        """The size of all tensors, in bytes."""
        parts = (self.bits, self.starts, self.values)
        return sum(part.numel() * part.element_size() for part in parts)

    def keep(self) -> torch.Tensor:
        """Returns the mask, bool [rows, columns]; starts and values are not looked at."""
        return unpack_words(self.bits)[:, : self.columns]

    def unpack(self) -> torch.Tensor:
        """Returns the weight [rows, columns], of the dtype of the values.

        Raises:
            LoweringError: The bits, the starts and the values contradict each other.
        """
        keep = unpack_words(self.bits)
        starts, kept = _starts_of(keep)
        consistent = kept == self.kept and not keep[:, self.columns :].any()
        if not consistent or not torch.equal(starts, self.starts):
            raise LoweringError(
                f"{kept} bits are set for {self.kept} values, or bits beyond column "
                f"{self.columns} are, or the starts are not those of the bits",
                where="a bitmap weight",
                next_step="pack the dense weight again",
            )
        weight = self.values.new_zeros(self.rows, self.columns)
        return weight.masked_scatter_(keep[:, : self.columns], self.values)


def pack_bitmap(weight: torch.Tensor, keep: torch.Tensor | None = None) -> BitmapWeight:
    """Packs a weight, on the device that it is on.

    Args:
        weight: [rows, columns] of float32, float16 or bfloat16, which the values keep.
        keep: bool [rows, columns]; by default what is not zero.

    Raises:
        LoweringError: The weight is no such matrix, keeps 2^31 weights or more, or a kept weight is
            not finite.
    """
    if weight.dim() != 2 or weight.dtype not in VALUE_DTYPES:
        raise LoweringError(
            f"a weight of {weight.dtype} {tuple(weight.shape)}",
            next_step="pack matrices of float32, float16 or bfloat16",
        )
    weight = weight.detach()
    keep = weight != 0 if keep is None else keep
    if keep.dtype != torch.bool or keep.shape != weight.shape:
        raise LoweringError(
            f"the mask is {keep.dtype} {tuple(keep.shape)}, the weight {tuple(weight.shape)}",
            next_step="pass a boolean mask of the shape of the weight",
        )
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(keep, (0, -columns % SEGMENT))
    starts, kept = _starts_of(padded)
    if kept > MOST_KEPT:
        raise LoweringError(
            f"{kept} weights are kept, the format counts to {MOST_KEPT}",
            next_step="split the weight along its rows",
        )
    values = weight[keep]
    if not all_finite(values):
        raise LoweringError("a kept weight is not finite", next_step="repair the checkpoint")
    stored = torch.cat([values, values.new_zeros(PADDING)])
    # The lowest byte of a word comes first on every machine that PyTorch's kernels are built for.
    packed = pack_bits(padded) if padded.numel() else starts.new_zeros(0, dtype=torch.uint8)
    bits = packed.view(torch.int32).view(rows, padded.shape[1] // 32)
    return BitmapWeight(bits, starts, stored, columns)


def unpack_words(bits: torch.Tensor) -> torch.Tensor:
    """Returns the bits of int32 [rows, words] as bool [rows, 32 * words]."""
    shape = (bits.shape[0], 32 * bits.shape[1])
    return unpack_bits(bits.contiguous().view(torch.uint8).flatten(), shape)


def _starts_of(keep: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where each segment's values begin, int32 [rows, segments], and how many values there are."""
    shape = (keep.shape[0], keep.shape[1] // SEGMENT)
    counts = keep.view(*shape, SEGMENT).sum(-1)
    ends = counts.flatten().cumsum(0)
    kept = int(ends[-1]) if ends.numel() else 0
    return (ends.view(shape) - counts).to(torch.int32), kept
