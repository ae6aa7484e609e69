"""The sum of the parts of a product whose columns were split, and the bias.

Parts are summed in order, so the same operands give the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case

TILE = 256
SPLITS = (2, 4, 8, 16)


@triton.jit(do_not_specialize=["tokens"])
def split_sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    out_stride,
    tile: tl.constexpr,
    split: tl.constexpr,
    has_bias: tl.constexpr,
):
    """out[token, row] = the sum over parts[part, token, row], and bias[row]."""
    token = tl.program_id(1)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    in_range = row < rows
    part_size = tokens.to(tl.int64) * rows
    parts = parts_ptr + token.to(tl.int64) * rows + row
    total = tl.zeros((tile,), tl.float32)
    for part in tl.static_range(split):
        total += tl.load(parts + part * part_size, mask=in_range, other=0.0)
    if has_bias:
        total += tl.load(bias_ptr + row, mask=in_range, other=0.0).to(tl.float32)
    out = out_ptr + token.to(tl.int64) * out_stride + row
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_range)


def launch(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Writes the sum of parts [split, tokens, rows], plus the bias, into out [tokens, rows]."""
    split, tokens, rows = parts.shape
    split_sum_kernel[(triton.cdiv(rows, TILE), tokens)](
        parts,
        bias,
        out,
        tokens,
        rows,
        out.stride(0),
        tile=TILE,
        split=split,
        has_bias=bias is not None,
        num_warps=4,
    )


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds: the kernel for every number of parts."""
    pointers = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    return [
        compile_case(
            f"split_sum split={split}",
            split_sum_kernel,
            pointers,
            {"tile": TILE, "split": split, "has_bias": True},
            num_warps=4,
            num_stages=2,
        )
        for split in SPLITS
    ]
