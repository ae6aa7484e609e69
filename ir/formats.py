"""The bitmask format: which weights of a matrix are kept as bits, and their values one after another.

    bitmask      uint8 [rows, 8 * ceil(columns / 64)]: bit k % 8 of byte k // 8 keeps column k
    row_offsets  int64 [rows + 1]: where the values of each row begin
    values       [kept + 64]: the kept values, row after row, then 64 zeros
    scales       float32 [rows, blocks]: of int8 values only

The 64 zeros let a kernel read whole registers from memory that is mapped to the end of a file.
2:4 weights are this same format: on a CPU a fixed count per group saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import Source, all_finite, pack_bits, unpack_bits

PADDING = 64
WORD = 64
VALUE_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True, eq=False)
class BitmaskWeight:
    """A weight [rows, columns] in the bitmask format; the module says what the tensors hold.

    Args:
        columns: The true width; the bitmask is wider by less than 64.
        block_size: Columns that share a scale, a multiple of 64; 0 for the whole row.
    """

    bitmask: torch.Tensor
    row_offsets: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None
    columns: int
    block_size: int = 0

    @property
    def rows(self) -> int:
        return self.bitmask.shape[0]

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return self.values.shape[0] - PADDING

    @property
    def nbytes(self) -> int:
        """The size of all tensors, in bytes."""
        parts = (self.bitmask, self.row_offsets, self.values, self.scales)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def keep(self) -> torch.Tensor:
        """Returns the mask, bool [rows, columns]."""
        shape = (self.rows, self.bitmask.shape[1] * 8)
        return unpack_bits(self.bitmask.reshape(-1), shape)[:, : self.columns]

    def unpack(self) -> torch.Tensor:
        """Returns the weight, float32 [rows, columns]."""
        weight = torch.zeros(self.rows, self.columns)
        weight[self.keep()] = self.values[: self.kept].float()
        if self.scales is None:
            return weight
        return weight * spread_scales(self.scales, self.columns, self.block_size)


def count_blocks(columns: int, block_size: int) -> int:
    """Returns how many scales a row has.

    Raises:
        LoweringError: The block size is not a multiple of 64.
    """
    if block_size < 0 or block_size % WORD:
        raise LoweringError(
            f"blocks of {block_size} columns",
            where="int8 values",
            next_step="a block size is a multiple of 64, or 0 for one scale a row",
        )
    return max(1, -(-columns // block_size)) if block_size else 1


def spread_scales(scales: torch.Tensor, columns: int, block_size: int) -> torch.Tensor:
    """Returns the scale of every weight, [rows, columns] (or [rows, 1] for one scale a row)."""
    if not block_size:
        return scales
    return scales.repeat_interleave(block_size, dim=1)[:, :columns]


def round_to_steps(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Returns how many steps each value is, as int8 values hold them: whole, -127 to 127."""
    return (values / steps).round().clamp(-127, 127)


def pack_bitmask(
    weight: torch.Tensor,
    keep: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    scales: torch.Tensor | None = None,
    block_size: int = 0,
) -> BitmaskWeight:
    """Packs a weight.

    Args:
        weight: [rows, columns], floating.
        keep: bool [rows, columns]; by default what is not zero.
        dtype: Of the values: float32, float16, bfloat16 or int8; rounded to nearest.
        scales: [rows, blocks], for int8: values are weight / scale, rounded.
        block_size: Columns that share a scale.

    Raises:
        LoweringError: A kept value is not finite, or does not fit into the dtype; a scale is not
            positive and finite.
    """
    rows, columns = weight.shape
    keep = weight != 0 if keep is None else keep
    values = weight.detach()[keep].float()
    if not all_finite(values):
        raise LoweringError("a kept weight is not finite", next_step="repair the checkpoint")
    if dtype == torch.int8:
        values = _quantize(values, keep, scales, block_size)
    elif scales is not None:
        raise LoweringError("scales go with int8 values", next_step="leave them out")
    values = values.to(dtype)
    if dtype == torch.float16 and not all_finite(values):
        raise LoweringError(
            "a kept weight does not fit into float16", next_step="use bfloat16 or int8 values"
        )
    words = -(-columns // WORD)
    padded = torch.zeros(rows, words * WORD, dtype=torch.bool)
    padded[:, :columns] = keep
    bitmask = pack_bits(padded).view(rows, words * 8)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = keep.sum(1).cumsum(0)
    stored = torch.cat([values, torch.zeros(PADDING, dtype=dtype)])
    kept_scales = None if scales is None else scales.float().contiguous()
    return BitmaskWeight(bitmask, offsets, stored, kept_scales, columns, block_size)


def _quantize(
    values: torch.Tensor, keep: torch.Tensor, scales: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    rows, columns = keep.shape
    if scales is None or scales.shape != (rows, count_blocks(columns, block_size)):
        raise LoweringError(
            f"int8 values of a {rows} x {columns} weight need scales "
            f"[{rows}, {count_blocks(columns, block_size)}]",
            next_step="run QuantizeValues, which chooses them",
        )
    if not (scales.isfinite() & (scales > 0)).all():
        raise LoweringError("a scale is not positive and finite", next_step="choose it again")
    steps = spread_scales(scales.float(), columns, block_size).expand(rows, columns)[keep]
    return round_to_steps(values, steps)


@dataclass(frozen=True, eq=False)
class ValueFormat:
    """How the kept values of one linear are stored.

    Args:
        dtype: A key of `VALUE_TYPES`.
        scales: float32 [out, blocks], of int8 values.
        block_size: Columns that share a scale; 0 for the whole row.
        accuracy_level: 4 when activations may be rounded to 8 bits for each row, 0 when not.
    """

    dtype: str
    scales: torch.Tensor | None = None
    block_size: int = 0
    accuracy_level: int = 0

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a weight [out, in] as it is after a round trip through the stored values."""
        if self.scales is None:
            return weight.to(VALUE_TYPES[self.dtype]).to(weight.dtype)
        steps = spread_scales(self.scales, weight.shape[1], self.block_size)
        return (round_to_steps(weight.float(), steps) * steps).to(weight.dtype)

    def pack(self, weight: torch.Tensor) -> BitmaskWeight:
        """Packs what is not zero of a weight [out, in]; see `pack_bitmask`."""
        return pack_bitmask(
            weight,
            dtype=VALUE_TYPES[self.dtype],
            scales=self.scales,
            block_size=self.block_size,
        )


@dataclass(frozen=True, eq=False)
class Rounded:
    """A source whose values are rounded to a format when it is loaded.

    Args:
        source: The tensor before rounding.
        format: Its scales belong to the [out, in] view.
        transposed: The tensor is stored [in, out].
    """

    source: Source
    format: ValueFormat
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def load(self) -> torch.Tensor:
        weight = self.source.load()
        return self.format.round(weight.T).T if self.transposed else self.format.round(weight)


@dataclass(frozen=True, eq=False)
class PackedValues:
    """The values of a packed weight, packed when they are loaded: a lowered model costs no copy.

    Args:
        source: The dense tensor.
        format: What the values become.
        transposed: The dense tensor is stored [in, out].
        kept: How many values there are without the padding.
    """

    source: Source
    format: ValueFormat
    transposed: bool
    kept: int
    shape: torch.Size = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size([self.kept + PADDING]))
        object.__setattr__(self, "dtype", VALUE_TYPES[self.format.dtype])

    def load(self) -> torch.Tensor:
        weight = self.source.load()
        values = self.format.pack(weight.T if self.transposed else weight).values
        if values.shape != self.shape:
            raise LoweringError(
                f"the weight keeps {values.shape[0] - PADDING} values, it kept {self.kept} when it "
                "was packed",
                next_step="lower again after changing weights",
            )
        return values
