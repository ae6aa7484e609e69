"""Unstructured product for a few tokens: a bit a weight, and the kept values side by side.

A thread finds the value of a column by counting the kept columns before it in a word of 32 bits:
about three times the instructions of a dense weight. Cards with little bandwidth for their cores
have them to spare; on cards with HBM the dense product is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zeroskip.ir.bitmap import BitmapWeight
from zeroskip.runtime.kernels.gpu import split_sum
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case
from zeroskip.runtime.kernels.gpu.halves import popcount
from zeroskip.runtime.kernels.gpu.launching import prepare, prepare_workspace, selects_bytes

WORD = 32
FEWEST_FOR_TENSOR_CORES = 16


@dataclass(frozen=True)
class BitmapGemvConfig:
    """How the work is cut.

    Args:
        tokens: Tokens of a block: 1, 2 or 4 on the ordinary cores, 16 on tensor cores.
        rows: Rows of a block.
        split: Blocks that share the columns of a row.
        warps: Warps of a block.
    """

    tokens: int
    rows: int
    split: int
    warps: int


CONFIGS = (
    BitmapGemvConfig(tokens=1, rows=32, split=1, warps=4),
    BitmapGemvConfig(tokens=1, rows=32, split=4, warps=4),
    BitmapGemvConfig(tokens=2, rows=16, split=1, warps=4),
    BitmapGemvConfig(tokens=2, rows=16, split=4, warps=4),
    BitmapGemvConfig(tokens=4, rows=16, split=1, warps=4),
    BitmapGemvConfig(tokens=4, rows=16, split=4, warps=4),
    BitmapGemvConfig(tokens=16, rows=64, split=1, warps=4),
    BitmapGemvConfig(tokens=16, rows=64, split=4, warps=4),
)


@triton.jit(do_not_specialize=["tokens"])
def bitmap_gemv_kernel(
    x_ptr,
    bits_ptr,
    starts_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    columns,
    x_stride,
    bits_stride,
    starts_stride,
    out_stride,
    part_stride,
    tile_tokens: tl.constexpr,
    tile_rows: tl.constexpr,
    word_columns: tl.constexpr,
    split: tl.constexpr,
    has_bias: tl.constexpr,
    has_popcount: tl.constexpr,
    on_tensor_cores: tl.constexpr,
):
    """out[part, token, row] = the part's share of x W^T, and bias if there is one part only."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    first_token = tl.program_id(2) * tile_tokens
    column = tl.arange(0, word_columns)
    # The bits of the columns before each column. Bit 31 is never one of them.
    before = (1 << column) - 1

    # Rows and tokens past the end read the last one and store nothing.
    last_row = tl.minimum(row, rows - 1).to(tl.int64)
    bits_base = bits_ptr + last_row * bits_stride
    starts_base = starts_ptr + last_row * starts_stride
    if on_tensor_cores:
        token = first_token + tl.arange(0, tile_tokens)
        last_token = tl.minimum(token, tokens - 1).to(tl.int64)
        x_base = x_ptr + last_token[None, :] * x_stride + column[:, None]
        total = tl.zeros((tile_rows, tile_tokens), tl.float32)
    else:
        x_stride64 = tl.full((), x_stride, tl.int64)
        x_base0 = x_ptr + tl.minimum(first_token, tokens - 1) * x_stride64 + column
        x_base1 = x_ptr + tl.minimum(first_token + 1, tokens - 1) * x_stride64 + column
        x_base2 = x_ptr + tl.minimum(first_token + 2, tokens - 1) * x_stride64 + column
        x_base3 = x_ptr + tl.minimum(first_token + 3, tokens - 1) * x_stride64 + column
        total0 = tl.zeros((tile_rows, word_columns), tl.float32)
        total1 = tl.zeros((tile_rows, word_columns), tl.float32)
        total2 = tl.zeros((tile_rows, word_columns), tl.float32)
        total3 = tl.zeros((tile_rows, word_columns), tl.float32)

    segments = tl.cdiv(columns, 2 * word_columns)
    part_segments = tl.cdiv(segments, split)
    last_segment = tl.minimum((part + 1) * part_segments, segments)
    for segment in range(part * part_segments, last_segment):
        start = tl.load(starts_base + segment)
        for half in tl.static_range(2):
            word = tl.load(bits_base + 2 * segment + half)
            keep = ((word[:, None] >> column[None, :]) & 1) != 0
            place = start[:, None] + popcount(word[:, None] & before[None, :], has_popcount)
            weight = tl.load(values_ptr + place, mask=keep, other=0.0)
            first_column = (2 * segment + half) * word_columns
            has_column = first_column + column < columns
            if on_tensor_cores:
                x = tl.load(x_base + first_column, mask=has_column[:, None], other=0.0)
                total = tl.dot(weight, x, total)
            else:
                factor = weight.to(tl.float32)
                x0 = tl.load(x_base0 + first_column, mask=has_column, other=0.0)
                total0 += factor * x0.to(tl.float32)[None, :]
                if tile_tokens > 1:
                    x1 = tl.load(x_base1 + first_column, mask=has_column, other=0.0)
                    total1 += factor * x1.to(tl.float32)[None, :]
                if tile_tokens > 2:
                    x2 = tl.load(x_base2 + first_column, mask=has_column, other=0.0)
                    total2 += factor * x2.to(tl.float32)[None, :]
                    x3 = tl.load(x_base3 + first_column, mask=has_column, other=0.0)
                    total3 += factor * x3.to(tl.float32)[None, :]
            start += popcount(word, has_popcount)

    has_row = row < rows
    if has_bias:
        bias = tl.load(bias_ptr + row, mask=has_row, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((tile_rows,), tl.float32)
    out_base = out_ptr + part.to(tl.int64) * part_stride
    if on_tensor_cores:
        out = out_base + token.to(tl.int64)[None, :] * out_stride + row[:, None]
        in_range = has_row[:, None] & (token < tokens)[None, :]
        tl.store(out, (total + bias[:, None]).to(out_ptr.dtype.element_ty), mask=in_range)
    else:
        for index in tl.static_range(tile_tokens):
            if index == 0:
                result = tl.sum(total0, 1)
            elif index == 1:
                result = tl.sum(total1, 1)
            elif index == 2:
                result = tl.sum(total2, 1)
            else:
                result = tl.sum(total3, 1)
            index_token = first_token + index
            out = out_base + index_token.to(tl.int64) * out_stride + row
            in_range = has_row & (index_token < tokens)
            tl.store(out, (result + bias).to(out_ptr.dtype.element_ty), mask=in_range)


def launch(
    x: torch.Tensor,
    weight: BitmapWeight,
    bias: torch.Tensor | None = None,
    config: BitmapGemvConfig = CONFIGS[0],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias.

    Args:
        x: [tokens, columns] of the weight's type.
        weight: What `zeroskip.ir.bitmap.pack_bitmap` made; the kernel reads that format.
        bias: [rows] or None.
        config: How to cut the work; any configuration serves any number of tokens.
        out: [tokens, rows] to write into.
        workspace: Float32, split * tokens * rows elements, if config.split is more than 1.

    Raises:
        LoweringError: The operands do not belong together.
    """
    where = "bitmap_gemv"
    rows, columns = weight.rows, weight.columns
    x, out = prepare(x, rows, columns, weight.values.dtype, bias, out, where)
    tokens = x.shape[0]
    if tokens == 0 or rows == 0:
        return out
    parts = None
    if config.split > 1:
        parts = prepare_workspace(workspace, config.split, tokens, rows, x, where)
    target = out if parts is None else parts
    grid = (triton.cdiv(rows, config.rows), config.split, triton.cdiv(tokens, config.tokens))
    bitmap_gemv_kernel[grid](
        x,
        weight.bits,
        weight.starts,
        weight.values,
        bias,
        target,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.bits.stride(0),
        weight.starts.stride(0),
        target.stride(-2),
        0 if parts is None else parts.stride(0),
        tile_tokens=config.tokens,
        tile_rows=config.rows,
        word_columns=WORD,
        split=config.split,
        has_bias=bias is not None and parts is None,
        has_popcount=selects_bytes(x.device),
        on_tensor_cores=config.tokens >= FEWEST_FOR_TENSOR_CORES,
        num_warps=config.warps,
    )
    if parts is not None:
        split_sum.launch(parts, bias, out)
    return out


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds: every configuration.

    Args:
        backend: `cuda`, or `hip`, where bits are counted by arithmetic.
    """
    cases = []
    for config in CONFIGS:
        on_tensor_cores = config.tokens >= FEWEST_FOR_TENSOR_CORES
        for float_type in ("bf16", "fp16"):
            case = compile_case(
                f"bitmap_gemv {config} {float_type}",
                bitmap_gemv_kernel,
                {
                    "x_ptr": f"*{float_type}",
                    "bits_ptr": "*i32",
                    "starts_ptr": "*i32",
                    "values_ptr": f"*{float_type}",
                    "bias_ptr": f"*{float_type}",
                    "out_ptr": f"*{float_type}" if config.split == 1 else "*fp32",
                },
                {
                    "tile_tokens": config.tokens,
                    "tile_rows": config.rows,
                    "word_columns": WORD,
                    "split": config.split,
                    "has_bias": config.split == 1,
                    "has_popcount": backend == "cuda",
                    "on_tensor_cores": on_tensor_cores,
                },
                num_warps=config.warps,
                num_stages=2,
                unaligned=frozenset({"tokens", "starts_stride", "bits_stride"}),
                required="MMA" if on_tensor_cores else "POPC" if backend == "cuda" else None,
            )
            cases.append(case)
    return cases
