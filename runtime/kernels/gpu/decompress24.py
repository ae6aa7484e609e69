"""2:4 to dense, for many tokens: the weight is written once more than it is read, then cuBLAS runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from zeroskip.ir.errors import LoweringError
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case
from zeroskip.runtime.kernels.gpu.launching import prepare, selects_bytes, starts_at_groups
from zeroskip.runtime.kernels.gpu.layout24 import SUB_STEPS, WORDS, Operands24


@dataclass(frozen=True)
class Decompress24Config:
    """How the work is cut.

    Args:
        rows: Rows of a block, which writes one chunk of 512 columns of each.
        warps: Warps of a block.
    """

    rows: int
    warps: int


CONFIGS = (Decompress24Config(rows=32, warps=4), Decompress24Config(rows=64, warps=4))


@triton.jit
def expand(pairs, places, byte_select: tl.constexpr):
    """Returns each group as its four 16-bit weights in an int64, column 0 lowest.

    Args:
        pairs: int32: the two kept weights.
        places: int32: their columns, one in each of the low bytes.
        byte_select: Use PRMT.
    """
    first = places & 3
    second = places >> 8
    if byte_select:
        # A byte of the selector for each column: 0x44 takes two bytes of the zero, 0x10 the first
        # weight and 0x32 the second.
        selector = 0x44444444 ^ (0x54 << (8 * first)) ^ (0x76 << (8 * second))
        zero = tl.zeros_like(pairs)
        low = libdevice.byte_perm(pairs, zero, selector)
        high = libdevice.byte_perm(pairs, zero, selector >> 16)
        group = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    else:
        first_weight = (pairs & 0xFFFF).to(tl.int64) << (16 * first).to(tl.int64)
        second_weight = ((pairs >> 16) & 0xFFFF).to(tl.int64) << (16 * second).to(tl.int64)
        group = first_weight | second_weight
    return group


@triton.jit
def decompress24_kernel(
    pairs_ptr,
    metadata_ptr,
    dense_ptr,
    rows,
    groups,
    pairs_stride,
    metadata_stride,
    dense_stride,
    tile_rows: tl.constexpr,
    chunk_words: tl.constexpr,
    sub_steps: tl.constexpr,
    byte_select: tl.constexpr,
):
    """Writes one chunk of some rows of the dense weight, as int64 groups of four columns."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    chunk = tl.program_id(1)
    word = tl.arange(0, chunk_words)
    has_row = (row < rows)[:, None]
    row64 = row.to(tl.int64)[:, None]
    first_word = chunk * chunk_words + word
    metadata = tl.load(
        metadata_ptr + row64 * metadata_stride + first_word[None, :], mask=has_row, other=0
    )
    for sub_step in tl.static_range(sub_steps):
        group = ((chunk * sub_steps + sub_step) * chunk_words + word)[None, :]
        in_range = has_row & (group < groups)
        pairs = tl.load(pairs_ptr + row64 * pairs_stride + group, mask=in_range, other=0)
        places = (metadata >> (2 * (sub_step % 4) + 16 * (sub_step // 4))) & 0x0303
        dense = dense_ptr.to(tl.pointer_type(tl.int64)) + row64 * dense_stride + group
        tl.store(dense, expand(pairs, places, byte_select), mask=in_range)


def decompress(
    weight: Operands24, config: Decompress24Config = CONFIGS[0], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the dense weight, [rows, columns].

    Args:
        weight: The packed weight.
        config: How to cut the work.
        out: [rows, columns] to write into; its rows are contiguous and start at multiples of 8
            bytes.

    Raises:
        LoweringError: out cannot take the weight.
    """
    rows, columns = weight.rows, weight.columns
    if out is None:
        out = torch.empty(rows, columns, dtype=weight.dtype, device=weight.pairs.device)
    fits = out.shape == (rows, columns) and out.dtype == weight.dtype
    if not fits or out.stride(1) != 1 or not starts_at_groups(out, 4):
        raise LoweringError(
            f"out is {out.dtype} {list(out.shape)}; the weight is {weight.dtype} {[rows, columns]}",
            where="decompress24",
            next_step="pass a contiguous out of that type and shape, aligned to 8 bytes",
        )
    if rows == 0 or columns == 0:
        return out
    chunks = weight.metadata.shape[1] // WORDS
    decompress24_kernel[(triton.cdiv(rows, config.rows), chunks)](
        weight.pairs,
        weight.metadata,
        out,
        rows,
        weight.groups,
        weight.pairs.stride(0),
        weight.metadata.stride(0),
        out.stride(0) // 4,
        tile_rows=config.rows,
        chunk_words=WORDS,
        sub_steps=SUB_STEPS,
        byte_select=selects_bytes(out.device),
        num_warps=config.warps,
    )
    return out


def launch(
    x: torch.Tensor,
    weight: Operands24,
    bias: torch.Tensor | None = None,
    config: Decompress24Config = CONFIGS[0],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias as the dense product of the weight written out.

    Args:
        x: [tokens, columns] of the weight's type.
        weight: The packed weight.
        bias: [rows] or None.
        config: How to cut the writing.
        out: [tokens, rows] to write into.
        workspace: Contiguous, of the weight's type, at least rows * columns elements. One serves
            all layers that run one after another.

    Raises:
        LoweringError: The operands do not belong together, or the workspace is too small.
    """
    rows, columns = weight.rows, weight.columns
    x, out = prepare(x, rows, columns, weight.dtype, bias, out, "decompress24")
    if x.shape[0] == 0 or rows == 0:
        return out
    dense = None
    if workspace is not None:
        size = rows * columns
        if workspace.dtype != weight.dtype or workspace.numel() < size:
            raise LoweringError(
                f"the workspace is {workspace.dtype} of {workspace.numel()} elements",
                where="decompress24",
                next_step=f"pass at least {size} contiguous elements of {weight.dtype}, or None",
            )
        dense = workspace.view(-1)[:size].view(rows, columns)
    dense = decompress(weight, config, dense)
    if bias is None:
        return torch.mm(x, dense.t(), out=out)
    return torch.addmm(bias, x, dense.t(), out=out)


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds.

    Args:
        backend: `cuda`, or `hip`, which has no PRMT.
    """
    return [
        compile_case(
            f"decompress24 {config}",
            decompress24_kernel,
            {"pairs_ptr": "*i32", "metadata_ptr": "*i32", "dense_ptr": "*bf16"},
            {
                "tile_rows": config.rows,
                "chunk_words": WORDS,
                "sub_steps": SUB_STEPS,
                "byte_select": backend == "cuda",
            },
            num_warps=config.warps,
            num_stages=2,
            required="PRMT" if backend == "cuda" else None,
        )
        for config in CONFIGS
    ]
