"""2:4 product on dense tensor cores: a tile of the weight is expanded in registers, then multiplied.

The weight is the left operand, so that its rows, of which there are many, fill the side of the tile
that has to be 64 on Hopper, and the tokens the side that may be as short as 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zeroskip.runtime.kernels.gpu import split_sum
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case
from zeroskip.runtime.kernels.gpu.decompress24 import expand
from zeroskip.runtime.kernels.gpu.launching import prepare, prepare_workspace, selects_bytes
from zeroskip.runtime.kernels.gpu.layout24 import SUB_STEPS, WORDS, Operands24


@dataclass(frozen=True)
class Gemm24Config:
    """How the work is cut.

    Args:
        tokens: Tokens of a block; at least 16.
        rows: Rows of a block.
        split: Blocks that share the columns of a row.
        warps: Warps of a block.
        stages: Turns whose loads are on their way at a time.
        turns: Turns that a chunk of 512 columns is worked on in: 1, or 2, which takes fewer
            registers and reads the metadata twice.
    """

    tokens: int
    rows: int
    split: int
    warps: int
    stages: int
    turns: int


CONFIGS = (
    Gemm24Config(tokens=16, rows=64, split=1, warps=4, stages=2, turns=1),
    Gemm24Config(tokens=16, rows=64, split=4, warps=4, stages=2, turns=1),
    Gemm24Config(tokens=16, rows=64, split=4, warps=4, stages=1, turns=1),
    Gemm24Config(tokens=16, rows=64, split=8, warps=4, stages=1, turns=1),
    Gemm24Config(tokens=64, rows=64, split=4, warps=4, stages=1, turns=2),
    Gemm24Config(tokens=64, rows=64, split=1, warps=4, stages=1, turns=2),
)


@triton.jit
def _dense_tile(
    pairs,
    places,
    rows: tl.constexpr,
    columns: tl.constexpr,
    is_float16: tl.constexpr,
    byte_select: tl.constexpr,
):
    """Returns the weights [rows, columns] of pairs [rows, columns / 4]."""
    group = expand(pairs, places, byte_select)
    column0 = group.to(tl.int16)
    column1 = (group >> 16).to(tl.int16)
    column2 = (group >> 32).to(tl.int16)
    column3 = (group >> 48).to(tl.int16)
    # join appends the innermost dimension: even and odd columns last, halves of a group before.
    halves = tl.join(tl.join(column0, column2), tl.join(column1, column3))
    tile = tl.reshape(halves, (rows, columns))
    float_type: tl.constexpr = tl.float16 if is_float16 else tl.bfloat16
    return tile.to(float_type, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def gemm24_kernel(
    x_ptr,
    pairs_ptr,
    metadata_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    groups,
    x_stride,
    pairs_stride,
    metadata_stride,
    out_stride,
    part_stride,
    tile_tokens: tl.constexpr,
    tile_rows: tl.constexpr,
    chunk_words: tl.constexpr,
    sub_steps: tl.constexpr,
    split: tl.constexpr,
    turns: tl.constexpr,
    stages: tl.constexpr,
    is_float16: tl.constexpr,
    has_bias: tl.constexpr,
    is_whole: tl.constexpr,
    byte_select: tl.constexpr,
):
    """out[part, token, row] = the part's share of x W^T, and bias if there is one part only.

    `is_whole` says that the columns of a row fill all chunks, so that no load needs a mask for them.
    """
    step_columns: tl.constexpr = 4 * chunk_words
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    token = tl.program_id(1) * tile_tokens + tl.arange(0, tile_tokens)
    part = tl.program_id(2)
    word = tl.arange(0, chunk_words)
    step_column = tl.arange(0, step_columns)

    # Rows and tokens past the end read the last one and store nothing: loads stay unconditional.
    last_row = tl.minimum(row, rows - 1).to(tl.int64)
    last_token = tl.minimum(token, tokens - 1).to(tl.int64)
    pairs_base = pairs_ptr + last_row[:, None] * pairs_stride + word[None, :]
    metadata_base = metadata_ptr + last_row[:, None] * metadata_stride + word[None, :]
    x_base = x_ptr + last_token[None, :] * x_stride + step_column[:, None]

    total = tl.zeros((tile_rows, tile_tokens), tl.float32)
    chunks = tl.cdiv(groups, sub_steps * chunk_words)
    part_chunks = tl.cdiv(chunks, split)
    last_chunk = tl.minimum((part + 1) * part_chunks, chunks)
    for turn in tl.range(part * part_chunks * turns, last_chunk * turns, num_stages=stages):
        chunk = turn >> (turns - 1)
        metadata = tl.load(metadata_base + chunk * chunk_words)
        if turns == 2:
            metadata = metadata >> (16 * (turn & 1))
        for sub_step in tl.static_range(sub_steps // turns):
            first_group = (turn * (sub_steps // turns) + sub_step) * chunk_words
            if is_whole:
                pairs = tl.load(pairs_base + first_group)
                x = tl.load(x_base + 4 * first_group)
            else:
                has_group = (first_group + word < groups)[None, :]
                has_column = (4 * first_group + step_column < 4 * groups)[:, None]
                pairs = tl.load(pairs_base + first_group, mask=has_group, other=0)
                x = tl.load(x_base + 4 * first_group, mask=has_column, other=0.0)
            places = (metadata >> (2 * (sub_step % 4) + 16 * (sub_step // 4))) & 0x0303
            dense = _dense_tile(pairs, places, tile_rows, step_columns, is_float16, byte_select)
            total = tl.dot(dense, x, total)

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
    weight: Operands24,
    bias: torch.Tensor | None = None,
    config: Gemm24Config = CONFIGS[0],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias.

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
    where = "gemm24"
    rows, columns = weight.rows, weight.columns
    x, out = prepare(x, rows, columns, weight.dtype, bias, out, where)
    tokens = x.shape[0]
    if tokens == 0 or rows == 0:
        return out
    parts = None
    if config.split > 1:
        parts = prepare_workspace(workspace, config.split, tokens, rows, x, where)
    target = out if parts is None else parts
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(tokens, config.tokens), config.split)
    gemm24_kernel[grid](
        x,
        weight.pairs,
        weight.metadata,
        bias,
        target,
        tokens,
        rows,
        weight.groups,
        x.stride(0),
        weight.pairs.stride(0),
        weight.metadata.stride(0),
        target.stride(-2),
        0 if parts is None else parts.stride(0),
        tile_tokens=config.tokens,
        tile_rows=config.rows,
        chunk_words=WORDS,
        sub_steps=SUB_STEPS,
        split=config.split,
        turns=config.turns,
        stages=config.stages,
        is_float16=weight.dtype == torch.float16,
        has_bias=bias is not None and parts is None,
        is_whole=weight.groups % (WORDS * SUB_STEPS) == 0,
        byte_select=selects_bytes(x.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts is not None:
        split_sum.launch(parts, bias, out)
    return out


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds: every configuration, for whole and for odd widths.

    Args:
        backend: `cuda`, or `hip`, which has no PRMT.
    """
    cases = []
    for config in CONFIGS:
        for is_whole, is_float16 in ((True, False), (False, True)):
            float_type = "fp16" if is_float16 else "bf16"
            case = compile_case(
                f"gemm24 {config} {float_type} {'whole' if is_whole else 'masked'}",
                gemm24_kernel,
                {
                    "x_ptr": f"*{float_type}",
                    "pairs_ptr": "*i32",
                    "metadata_ptr": "*i32",
                    "bias_ptr": f"*{float_type}",
                    "out_ptr": f"*{float_type}" if config.split == 1 else "*fp32",
                },
                {
                    "tile_tokens": config.tokens,
                    "tile_rows": config.rows,
                    "chunk_words": WORDS,
                    "sub_steps": SUB_STEPS,
                    "split": config.split,
                    "turns": config.turns,
                    "stages": config.stages,
                    "is_float16": is_float16,
                    "has_bias": config.split == 1,
                    "is_whole": is_whole,
                    "byte_select": backend == "cuda",
                },
                num_warps=config.warps,
                num_stages=config.stages,
                required="MMA",
            )
            cases.append(case)
    return cases
