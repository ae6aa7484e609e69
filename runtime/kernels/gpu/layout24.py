"""A 2:4 weight as the Triton kernels read it.

    pairs     int32 [rows, columns / 4]: the two kept values of each group of four columns
    metadata  int32 [rows, 16 * chunks]: which columns they are, 8 groups a word

A chunk is 512 columns, 128 groups. Word b of a chunk describes the groups b, 16 + b, .. 112 + b of
it: eight sub-steps, in each of which 16 adjacent words meet 16 adjacent pairs. A thread that holds
some pairs therefore holds their metadata too, and reads both 16 bytes at a time.

Sub-step s of a word has the first kept column (0 to 3) at bit 2 (s % 4) + 16 (s // 4) and the
second 8 bits above it: one shift leaves the two in two bytes, which is what PRMT wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import EMPTY, SemiStructuredWeight, check_codes

SUB_STEPS = 8
WORDS = 16  # of a chunk
CHUNK_GROUPS = SUB_STEPS * WORDS


@dataclass(frozen=True, eq=False)
class Operands24:
    """A 2:4 weight on a device; the module says what the tensors hold.

    Args:
        pairs: int32 [rows, groups].
        metadata: int32 [rows, 16 * chunks].
        dtype: What the halves of a pair are.
    """

    pairs: torch.Tensor
    metadata: torch.Tensor
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.pairs.shape[0]

    @property
    def groups(self) -> int:
        return self.pairs.shape[1]

    @property
    def columns(self) -> int:
        return 4 * self.groups

    @property
    def nbytes(self) -> int:
        """The size of both tensors, in bytes."""
        return 4 * (self.pairs.numel() + self.metadata.numel())


def pack(weight: SemiStructuredWeight) -> Operands24:
    """Packs a weight in the canonical format, on the device where it lies.

    Args:
        weight: Of float16 or bfloat16. Its values are shared, not copied, if they are contiguous.

    Raises:
        LoweringError: The weight is of another type, or a code names no two columns in order.
    """
    values = weight.values
    if values.element_size() != 2:
        raise LoweringError(
            f"values of type {values.dtype}",
            where="a 2:4 weight",
            next_step="the kernels take float16 and bfloat16; convert the weight",
        )
    check_codes(weight.codes)
    # A kernel reads four pairs at a time.
    aligned = values.is_contiguous() and values.data_ptr() % 16 == 0
    pairs = (values if aligned else values.clone(memory_format=torch.contiguous_format)).detach()
    return Operands24(pairs.view(torch.int32), _pack_metadata(weight.nibbles()), values.dtype)


def _pack_metadata(nibbles: torch.Tensor) -> torch.Tensor:
    rows, groups = nibbles.shape
    chunks = -(-groups // CHUNK_GROUPS)
    padded = nibbles.new_full((rows, chunks * CHUNK_GROUPS), EMPTY)
    padded[:, :groups] = nibbles
    steps = padded.view(rows, chunks, SUB_STEPS, WORDS)
    metadata = torch.zeros(rows, chunks, WORDS, dtype=torch.int32, device=nibbles.device)
    for step in range(SUB_STEPS):
        shift = 2 * (step % 4) + 16 * (step // 4)
        nibble = steps[:, :, step].int()
        # Bits 30 and 31 are those of the last sub-step: the shift may make a word negative.
        metadata |= ((nibble & 3) | (nibble >> 2) << 8) << shift
    return metadata.view(rows, chunks * WORDS)
