"""`zeroskip::masked_linear` on CUDA: a Triton kernel that never writes the masked weight.

Importing this module registers it. What the kernel reads of a mask is made when it is first needed
and lives as long as the mask's tensor; a mask that is written into is read again. Many tokens, other
dtypes than float16 and bfloat16, and machines without Triton get the dense computation.
"""

from __future__ import annotations

import threading

import torch
from torch.utils.weak import WeakIdKeyDictionary

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.linear_24 import as_rows
from zeroskip.ir.ops import masked_linear
from zeroskip.ir.weights import unpack_bits

MOST_TOKENS = 64
"""With more, cuBLAS makes up for writing the masked weight; the kernel's tiles are for few."""
FEW = 16

Tiles = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_tiles: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


@masked_linear.register_kernel("cuda")
def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask_bits: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `zeroskip::masked_linear`: by the kernel for few tokens, else through the masked weight."""
    rows = as_rows(x)
    if 0 < rows.shape[0] <= MOST_TOKENS and not mask_bits.is_inference():
        try:
            y = _launch(rows, weight, mask_bits, bias)
            return y.reshape(*x.shape[:-1], weight.shape[0])
        except (ImportError, LoweringError):
            pass  # No Triton, or operands that the kernel does not take.
    masked = weight.masked_fill(~unpack_bits(mask_bits, weight.shape), 0)
    return torch.nn.functional.linear(x, masked, bias)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, mask_bits: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from zeroskip.runtime.kernels.gpu import masked_gemm

    weight = weight.detach()
    tiles = _tiles_of(weight, mask_bits)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    operands = masked_gemm.MaskedOperands(weight, *tiles)
    skips = operands.live_share < 1
    tokens = FEW if x.shape[0] <= FEW else MOST_TOKENS
    split = 4 if tokens == FEW else 1
    config = next(
        each
        for each in masked_gemm.CONFIGS
        if (each.tokens, each.split, each.skips) == (tokens, split, skips)
    )
    return masked_gemm.launch(x, operands, bias, config)


def _tiles_of(weight: torch.Tensor, mask_bits: torch.Tensor) -> Tiles:
    """Returns the mask as the kernel reads it, and its live tiles."""
    from zeroskip.runtime.kernels.gpu import masked_gemm

    with _lock:
        found = (weight.shape, mask_bits._version)
        held = _tiles.get(mask_bits)  # type: ignore[no-untyped-call]
        if held is None or held[0] != found:
            packed = masked_gemm.pack(weight, mask_bits)
            # What is remembered must not hold the bits, or they would live for ever.
            mask = packed.mask.clone() if packed.mask._is_view() else packed.mask
            held = (found, (mask, packed.tile_starts, packed.tile_columns))
            _tiles[mask_bits] = held
        tiles: Tiles = held[1]
        return tiles
