"""2:4 product for a few tokens on the ordinary cores: each group of activations is read once, 8 bytes.

The two activations that meet a pair of weights are selected from those 8 bytes by one PRMT on NVIDIA
GPUs, and by two 64-bit shifts elsewhere. A block works on `chunks` chunks of its rows at a time, side
by side, so that few rows still make many loads; `split` blocks share the columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from zeroskip.runtime.kernels.gpu import split_sum
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case
from zeroskip.runtime.kernels.gpu.halves import high_half, low_half
from zeroskip.runtime.kernels.gpu.launching import (
    prepare,
    prepare_workspace,
    selects_bytes,
    starts_at_groups,
)
from zeroskip.runtime.kernels.gpu.layout24 import SUB_STEPS, WORDS, Operands24


@dataclass(frozen=True)
class Gemv24Config:
    """How the work is cut.

    Args:
        tokens: Tokens that one pass over the weight serves: 1, 2 or 4.
        rows: Rows of a block.
        chunks: Chunks of 512 columns that a block works on at a time.
        split: Blocks that share the columns of a row.
        warps: Warps of a block.
        turns: 2 works on a step in two turns of four sub-steps each, which takes fewer registers and
            reads the metadata twice; or 1.
    """

    tokens: int
    rows: int
    chunks: int
    split: int
    warps: int
    turns: int


CONFIGS = (
    Gemv24Config(tokens=1, rows=8, chunks=8, split=1, warps=8, turns=2),
    Gemv24Config(tokens=1, rows=8, chunks=4, split=1, warps=4, turns=2),
    Gemv24Config(tokens=1, rows=8, chunks=4, split=2, warps=4, turns=1),
    Gemv24Config(tokens=1, rows=16, chunks=2, split=4, warps=4, turns=1),
    Gemv24Config(tokens=1, rows=32, chunks=1, split=4, warps=4, turns=1),
    Gemv24Config(tokens=2, rows=8, chunks=8, split=1, warps=8, turns=2),
    Gemv24Config(tokens=2, rows=8, chunks=4, split=2, warps=4, turns=2),
    Gemv24Config(tokens=2, rows=16, chunks=2, split=2, warps=4, turns=2),
    Gemv24Config(tokens=4, rows=8, chunks=4, split=2, warps=8, turns=2),
    Gemv24Config(tokens=4, rows=16, chunks=2, split=2, warps=8, turns=2),
)


@triton.jit
def _load_groups(pointers, in_range, is_whole: tl.constexpr):
    """Returns groups of four activations as int64; zeros past the end of a row."""
    return tl.load(pointers) if is_whole else tl.load(pointers, mask=in_range, other=0)


@triton.jit
def _accumulate(total, pairs, selected, is_float16: tl.constexpr):
    """Returns total plus both products of each pair of weights with its two activations."""
    total += low_half(pairs, is_float16) * low_half(selected, is_float16)
    total += high_half(pairs, is_float16) * high_half(selected, is_float16)
    return total


@triton.jit
def _select(group, places, byte_select: tl.constexpr):
    """Returns the two activations of each group that meet its weights, as a pair.

    Args:
        group: int64 [words]: four activations.
        places: int32 [rows, words]: the two kept columns, one in each of the low bytes.
        byte_select: Use PRMT.
    """
    if byte_select:
        # Column i is bytes 2i and 2i + 1 of the eight: nibbles of the selector, lowest first.
        selector = places * 0x22 + 0x1010
        low = tl.broadcast_to(group.to(tl.int32)[None, :], selector.shape)
        high = tl.broadcast_to((group >> 32).to(tl.int32)[None, :], selector.shape)
        selected = libdevice.byte_perm(low, high, selector)
    else:
        first = group[None, :] >> ((places & 3) * 16).to(tl.int64)
        second = group[None, :] >> ((places >> 8) * 16).to(tl.int64)
        selected = (first & 0xFFFF).to(tl.int32) | (second.to(tl.int32) << 16)
    return selected


@triton.jit(do_not_specialize=["tokens"])
def gemv24_kernel(
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
    tile_chunks: tl.constexpr,
    chunk_words: tl.constexpr,
    sub_steps: tl.constexpr,
    split: tl.constexpr,
    turns: tl.constexpr,
    is_float16: tl.constexpr,
    has_bias: tl.constexpr,
    is_whole: tl.constexpr,
    byte_select: tl.constexpr,
):
    """out[part, token, row] = the part's share of x W^T, and bias if there is one part only.

    Strides are in elements, that of x in groups of four. `is_whole` says that the columns of a row
    fill all steps, so that no load needs a mask.
    """
    tile_words: tl.constexpr = tile_chunks * chunk_words
    step_groups: tl.constexpr = tile_words * sub_steps
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    first_token = tl.program_id(2) * tile_tokens
    word = tl.arange(0, tile_words)
    # The group of sub-step 0 that a word describes, counted from the first of the tile.
    word_group = (word // chunk_words) * (chunk_words * sub_steps) + word % chunk_words

    # Rows and tokens past the end read the last one and store nothing: loads stay unconditional.
    last_row = tl.minimum(row, rows - 1).to(tl.int64)
    pairs_base = pairs_ptr + last_row[:, None] * pairs_stride + word_group[None, :]
    metadata_base = metadata_ptr + last_row[:, None] * metadata_stride + word[None, :]
    x_base = x_ptr.to(tl.pointer_type(tl.int64)) + word_group
    x_stride64 = tl.full((), x_stride, tl.int64)
    x_base0 = x_base + tl.minimum(first_token, tokens - 1) * x_stride64
    x_base1 = x_base + tl.minimum(first_token + 1, tokens - 1) * x_stride64
    x_base2 = x_base + tl.minimum(first_token + 2, tokens - 1) * x_stride64
    x_base3 = x_base + tl.minimum(first_token + 3, tokens - 1) * x_stride64

    total0 = tl.zeros((tile_rows, tile_words), tl.float32)
    total1 = tl.zeros((tile_rows, tile_words), tl.float32)
    total2 = tl.zeros((tile_rows, tile_words), tl.float32)
    total3 = tl.zeros((tile_rows, tile_words), tl.float32)

    steps = tl.cdiv(groups, step_groups)
    part_steps = tl.cdiv(steps, split)
    last_step = tl.minimum((part + 1) * part_steps, steps)
    for turn in range(part * part_steps * turns, last_step * turns):
        step = turn >> (turns - 1)
        turn_of_step = turn & (turns - 1)
        first_word = step * tile_words
        if is_whole:
            metadata = tl.load(metadata_base + first_word, eviction_policy="evict_first")
        else:
            has_word = (first_word + word < metadata_stride)[None, :]
            metadata = tl.load(metadata_base + first_word, mask=has_word, other=0)
        if turns == 2:
            metadata = metadata >> (16 * turn_of_step)
        first_turn_group = step * step_groups + turn_of_step * (sub_steps // turns * chunk_words)
        for sub_step in tl.static_range(sub_steps // turns):
            first_group = first_turn_group + sub_step * chunk_words
            places = (metadata >> (2 * (sub_step % 4) + 16 * (sub_step // 4))) & 0x0303
            in_range = first_group + word_group < groups
            if is_whole:
                pairs = tl.load(pairs_base + first_group, eviction_policy="evict_first")
            else:
                pairs = tl.load(pairs_base + first_group, mask=in_range[None, :], other=0)
            group0 = _load_groups(x_base0 + first_group, in_range, is_whole)
            selected0 = _select(group0, places, byte_select)
            total0 = _accumulate(total0, pairs, selected0, is_float16)
            if tile_tokens > 1:
                group1 = _load_groups(x_base1 + first_group, in_range, is_whole)
                selected1 = _select(group1, places, byte_select)
                total1 = _accumulate(total1, pairs, selected1, is_float16)
            if tile_tokens > 2:
                group2 = _load_groups(x_base2 + first_group, in_range, is_whole)
                selected2 = _select(group2, places, byte_select)
                total2 = _accumulate(total2, pairs, selected2, is_float16)
                group3 = _load_groups(x_base3 + first_group, in_range, is_whole)
                selected3 = _select(group3, places, byte_select)
                total3 = _accumulate(total3, pairs, selected3, is_float16)

    has_row = row < rows
    if has_bias:
        bias = tl.load(bias_ptr + row, mask=has_row, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((tile_rows,), tl.float32)
    out_base = out_ptr + part.to(tl.int64) * part_stride + row
    for index in tl.static_range(tile_tokens):
        if index == 0:
            total = tl.sum(total0, 1)
        elif index == 1:
            total = tl.sum(total1, 1)
        elif index == 2:
            total = tl.sum(total2, 1)
        else:
            total = tl.sum(total3, 1)
        token = first_token + index
        out = out_base + token.to(tl.int64) * out_stride
        tl.store(out, (total + bias).to(out_ptr.dtype.element_ty), mask=has_row & (token < tokens))


def launch(
    x: torch.Tensor,
    weight: Operands24,
    bias: torch.Tensor | None = None,
    config: Gemv24Config = CONFIGS[0],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias.

    Args:
        x: [tokens, columns] of the weight's type. Rows that start at no multiple of 8 bytes are
            copied first.
        weight: The packed weight.
        bias: [rows] or None.
        config: How to cut the work; any configuration serves any number of tokens.
        out: [tokens, rows] to write into.
        workspace: Float32, split * tokens * rows elements, if config.split is more than 1.

    Raises:
        LoweringError: The operands do not belong together.
    """
    where = "gemv24"
    rows, columns = weight.rows, weight.columns
    x, out = prepare(x, rows, columns, weight.dtype, bias, out, where)
    tokens = x.shape[0]
    if tokens == 0 or rows == 0:
        return out
    if not starts_at_groups(x, 4):
        x = x.clone(memory_format=torch.contiguous_format)
    split = config.split
    parts = None
    if split > 1:
        parts = prepare_workspace(workspace, split, tokens, rows, x, where)
    target = out if parts is None else parts
    grid = (triton.cdiv(rows, config.rows), split, triton.cdiv(tokens, config.tokens))
    gemv24_kernel[grid](
        x,
        weight.pairs,
        weight.metadata,
        bias,
        target,
        tokens,
        rows,
        weight.groups,
        x.stride(0) // 4,
        weight.pairs.stride(0),
        weight.metadata.stride(0),
        target.stride(-2),
        0 if parts is None else parts.stride(0),
        tile_tokens=config.tokens,
        tile_rows=config.rows,
        tile_chunks=config.chunks,
        chunk_words=WORDS,
        sub_steps=SUB_STEPS,
        split=split,
        turns=config.turns,
        is_float16=weight.dtype == torch.float16,
        has_bias=bias is not None and parts is None,
        is_whole=weight.groups % (config.chunks * WORDS * SUB_STEPS) == 0,
        byte_select=selects_bytes(x.device),
        num_warps=config.warps,
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
        for is_whole, is_float16 in ((True, False), (True, True), (False, False)):
            float_type = "fp16" if is_float16 else "bf16"
            name = f"gemv24 {config} {float_type} {'whole' if is_whole else 'masked'}"
            case = compile_case(
                name,
                gemv24_kernel,
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
                    "tile_chunks": config.chunks,
                    "chunk_words": WORDS,
                    "sub_steps": SUB_STEPS,
                    "split": config.split,
                    "turns": config.turns,
                    "is_float16": is_float16,
                    "has_bias": config.split == 1,
                    "is_whole": is_whole,
                    "byte_select": backend == "cuda",
                },
                num_warps=config.warps,
                num_stages=2,
                required="PRMT" if backend == "cuda" else None,
            )
            cases.append(case)
    return cases
