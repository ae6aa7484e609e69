"""Product with a dense weight and one bit a weight: the masked weight is never written.

It reads 17/16 of what the dense product reads, so it serves masks that change, not speed. Tiles of
64 x 64 without a kept weight can be left out, by a list of the live ones: that does make it faster.

    mask          uint8 [rows, 8 * tiles]: bit k % 8 of byte k // 8 keeps column k; a tile is 64
    tile_starts   int32 [tile rows + 1]: where the list of each 64 rows begins
    tile_columns  int32 [live tiles]: the live tiles of those rows, counted in tiles
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import pack_bits, unpack_bits
from zeroskip.runtime.kernels.gpu import split_sum
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case
from zeroskip.runtime.kernels.gpu.launching import prepare, prepare_workspace

TILE = 64


@dataclass(frozen=True, eq=False)
class MaskedOperands:
    """A dense weight and its mask on a device; the module says what the tensors hold.

    Args:
        weight: float16 or bfloat16 [rows, columns]; entries that are not kept may be anything.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    tile_starts: torch.Tensor
    tile_columns: torch.Tensor

    @property
    def live_share(self) -> float:
        """The share of the tiles that have a kept weight: what skipping the others leaves to do."""
        tiles = (self.tile_starts.shape[0] - 1) * (self.mask.shape[1] * 8 // TILE)
        return self.tile_columns.shape[0] / tiles if tiles else 1.0


@dataclass(frozen=True)
class MaskedGemmConfig:
    """How the work is cut.

    Args:
        tokens: Tokens of a block; at least 16.
        split: Blocks that share the columns of a row.
        skips: Leave out the tiles without a kept weight.
        warps: Warps of a block.
        stages: Tiles that are on their way at a time.
    """

    tokens: int
    split: int
    skips: bool
    warps: int
    stages: int


CONFIGS = tuple(
    MaskedGemmConfig(tokens=tokens, split=split, skips=skips, warps=4, stages=3)
    for skips in (False, True)
    for tokens, split in ((16, 1), (16, 4), (16, 8), (64, 1))
)


def pack(weight: torch.Tensor, bits: torch.Tensor) -> MaskedOperands:
    """Packs a dense weight and the bits of its mask, on the device where they lie.

    Args:
        weight: float16 or bfloat16 [rows, columns]; not copied if its rows are contiguous.
        bits: What `zeroskip.ir.weights.pack_bits` made of the mask; True keeps the entry.

    Raises:
        LoweringError: The weight is no 16-bit matrix, or the bits are not as many.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float16, torch.bfloat16):
        raise LoweringError(
            f"a weight of {weight.dtype} {list(weight.shape)}",
            where="masked_gemm",
            next_step="the kernel takes float16 and bfloat16 matrices; convert the weight",
        )
    if bits.dtype != torch.uint8 or bits.numel() != -(-weight.numel() // 8):
        raise LoweringError(
            f"{bits.numel()} bytes of bits for a weight {list(weight.shape)}",
            where="masked_gemm",
            next_step="pass what pack_bits makes of a mask of the weight's shape",
        )
    rows, columns = weight.shape
    keep = unpack_bits(bits, weight.shape)
    padded = torch.nn.functional.pad(keep, (0, -columns % TILE, 0, -rows % TILE))
    tile_rows, tiles = padded.shape[0] // TILE, padded.shape[1] // TILE
    live = padded.view(tile_rows, TILE, tiles, TILE).any(3).any(1)
    starts = torch.nn.functional.pad(live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    if columns % TILE == 0:
        mask = bits.view(rows, columns // 8)
    else:
        mask = pack_bits(padded[:rows]).view(rows, tiles * TILE // 8)
    weight = weight.detach()
    return MaskedOperands(
        weight if weight.stride(1) == 1 else weight.contiguous(),
        mask,
        starts,
        live.nonzero()[:, 1].to(torch.int32),
    )


@triton.jit(do_not_specialize=["tokens"])
def masked_gemm_kernel(
    x_ptr,
    weight_ptr,
    mask_ptr,
    tile_starts_ptr,
    tile_columns_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    x_stride,
    weight_stride,
    mask_stride,
    out_stride,
    part_stride,
    tile_tokens: tl.constexpr,
    tile: tl.constexpr,
    split: tl.constexpr,
    stages: tl.constexpr,
    skips: tl.constexpr,
    has_bias: tl.constexpr,
    is_whole: tl.constexpr,
):
    """out[part, token, row] = the part's share of x W^T, and bias if there is one part only.

    `is_whole` says that the columns fill all tiles, so that no load needs a mask for them.
    """
    tile_row = tl.program_id(0)
    row = tile_row * tile + tl.arange(0, tile)
    token = tl.program_id(1) * tile_tokens + tl.arange(0, tile_tokens)
    part = tl.program_id(2)
    tile_column = tl.arange(0, tile)
    octet = tl.arange(0, tile // 8)
    bit = tl.arange(0, 8)

    # Rows and tokens past the end read the last one and store nothing: loads stay unconditional.
    last_row = tl.minimum(row, rows - 1).to(tl.int64)
    last_token = tl.minimum(token, tokens - 1).to(tl.int64)
    weight_base = weight_ptr + last_row[:, None] * weight_stride + tile_column[None, :]
    mask_base = mask_ptr + last_row[:, None] * mask_stride + octet[None, :]
    x_base = x_ptr + last_token[None, :] * x_stride + tile_column[:, None]

    if skips:
        first_tile = tl.load(tile_starts_ptr + tile_row)
        last_tile = tl.load(tile_starts_ptr + tile_row + 1)
    else:
        first_tile = 0
        last_tile = tl.cdiv(columns, tile)
    part_tiles = tl.cdiv(last_tile - first_tile, split)
    part_first = first_tile + part * part_tiles
    part_last = tl.minimum(part_first + part_tiles, last_tile)

    total = tl.zeros((tile, tile_tokens), tl.float32)
    for index in tl.range(part_first, part_last, num_stages=stages):
        tile_index = index
        if skips:
            tile_index = tl.load(tile_columns_ptr + index)
        first_column = tile_index * tile
        octets = tl.load(mask_base + tile_index * (tile // 8))
        bits = (octets[:, :, None].to(tl.int32) >> bit[None, None, :]) & 1
        keep = tl.reshape(bits, (tile, tile)) != 0
        if is_whole:
            weight = tl.load(weight_base + first_column)
            x = tl.load(x_base + first_column)
        else:
            has_column = first_column + tile_column < columns
            weight = tl.load(weight_base + first_column, mask=has_column[None, :], other=0.0)
            x = tl.load(x_base + first_column, mask=has_column[:, None], other=0.0)
        weight = tl.where(keep, weight, tl.zeros_like(weight))
        total = tl.dot(weight, x, total)

    has_row = row < rows
    if has_bias:
        bias = tl.load(bias_ptr + row, mask=has_row, other=0.0).to(tl.float32)
        total += bias[:, None]
    out = out_ptr + part.to(tl.int64) * part_stride
    out += token.to(tl.int64)[None, :] * out_stride + row[:, None]
    in_range = has_row[:, None] & (token < tokens)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_range)


def launch(
    x: torch.Tensor,
    weight: MaskedOperands,
    bias: torch.Tensor | None = None,
    config: MaskedGemmConfig = CONFIGS[0],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x (W * mask)^T + bias.

    Args:
        x: [tokens, columns] of the weight's type.
        weight: The packed weight.
        bias: [rows] or None.
        config: How to cut the work; any configuration serves any number of tokens.
        out: [tokens, rows] to write into.
        workspace: Float32, split * tokens * rows elements, if config.split is more than 1.

    Raises:
        LoweringError: The operands do not belong together.
    """
    where = "masked_gemm"
    rows, columns = weight.weight.shape
    x, out = prepare(x, rows, columns, weight.weight.dtype, bias, out, where)
    tokens = x.shape[0]
    if tokens == 0 or rows == 0:
        return out
    parts = None
    if config.split > 1:
        parts = prepare_workspace(workspace, config.split, tokens, rows, x, where)
    target = out if parts is None else parts
    grid = (triton.cdiv(rows, TILE), triton.cdiv(tokens, config.tokens), config.split)
    masked_gemm_kernel[grid](
        x,
        weight.weight,
        weight.mask,
        weight.tile_starts,
        weight.tile_columns,
        bias,
        target,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.weight.stride(0),
        weight.mask.stride(0),
        target.stride(-2),
        0 if parts is None else parts.stride(0),
        tile_tokens=config.tokens,
        tile=TILE,
        split=config.split,
        stages=config.stages,
        skips=config.skips,
        has_bias=bias is not None and parts is None,
        is_whole=columns % TILE == 0,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts is not None:
        split_sum.launch(parts, bias, out)
    return out


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds: every configuration, for whole and for odd widths."""
    cases = []
    for config in CONFIGS:
        for is_whole, float_type in ((True, "bf16"), (False, "fp16")):
            case = compile_case(
                f"masked_gemm {config} {float_type} {'whole' if is_whole else 'masked'}",
                masked_gemm_kernel,
                {
                    "x_ptr": f"*{float_type}",
                    "weight_ptr": f"*{float_type}",
                    "mask_ptr": "*u8",
                    "tile_starts_ptr": "*i32",
                    "tile_columns_ptr": "*i32",
                    "bias_ptr": f"*{float_type}",
                    "out_ptr": f"*{float_type}" if config.split == 1 else "*fp32",
                },
                {
                    "tile_tokens": config.tokens,
                    "tile": TILE,
                    "split": config.split,
                    "stages": config.stages,
                    "skips": config.skips,
                    "has_bias": config.split == 1,
                    "is_whole": is_whole,
                },
                num_warps=config.warps,
                num_stages=config.stages,
                required="MMA",
            )
            cases.append(case)
    return cases
