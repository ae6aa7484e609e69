"""What every launcher of a Triton kernel checks, and the operands it may leave to its caller.

A launcher given `out` and `workspace` allocates nothing, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from zeroskip.ir.errors import LoweringError

FLOAT_TYPES = (torch.float16, torch.bfloat16)


def selects_bytes(device: torch.device) -> bool:
    """Returns whether a device has PRMT, which picks any four of eight bytes: NVIDIA's have."""
    return device.type == "cuda" and torch.version.hip is None


def prepare(
    x: torch.Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    where: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the operands of y = x W^T + bias and returns x, its rows contiguous, and y.

    Args:
        x: [tokens, columns]; rows may lie apart. It is copied only if its columns do.
        rows: Rows of the weight.
        columns: Columns of the weight.
        dtype: Type of the weight's values.
        bias: [rows] or None.
        out: [tokens, rows] to write into, its rows contiguous; None to allocate it.
        where: The kernel, for messages.

    Raises:
        LoweringError: The operands do not belong together.
    """
    if dtype not in FLOAT_TYPES:
        raise LoweringError(
            f"values of type {dtype}",
            where=where,
            next_step="the kernels take float16 and bfloat16; convert the weight",
        )
    if x.dim() != 2 or x.shape[1] != columns or x.dtype != dtype:
        raise LoweringError(
            f"x is {x.dtype} {list(x.shape)}; the weight takes {dtype} [tokens, {columns}]",
            where=where,
            next_step="flatten the leading dimensions of x and convert it to the weight's type",
        )
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        raise LoweringError(
            f"the bias is {list(bias.shape)}; the weight has {rows} rows",
            where=where,
            next_step="pass a contiguous bias of one entry a row, or None",
        )
    if out is None:
        out = x.new_empty(x.shape[0], rows)
    elif out.shape != (x.shape[0], rows) or out.dtype != dtype or out.stride(1) != 1:
        raise LoweringError(
            f"out is {out.dtype} {list(out.shape)}; the product is {dtype} [{x.shape[0]}, {rows}]",
            where=where,
            next_step="pass an out of that type and shape whose rows are contiguous",
        )
    return (x if x.stride(1) == 1 or columns == 1 else x.contiguous()), out


def starts_at_groups(x: torch.Tensor, width: int) -> bool:
    """Returns whether every row of a 16-bit matrix starts at a multiple of `width` elements."""
    apart = x.shape[0] > 1 and x.stride(0) % width
    return not apart and x.data_ptr() % (2 * width) == 0


def prepare_workspace(
    workspace: torch.Tensor | None, split: int, tokens: int, rows: int, x: torch.Tensor, where: str
) -> torch.Tensor:
    """Returns room for the partial sums of a split product, float32 [split, tokens, rows].

    Args:
        workspace: Contiguous float32 of at least split * tokens * rows elements, on the device of
            x, whose contents are lost; None to allocate it.
        split: Parts that the columns are split into.
        tokens: Rows of x.
        rows: Rows of the weight.
        x: The activations.
        where: The kernel, for messages.

    Raises:
        LoweringError: The workspace is too small, or of another type.
    """
    size = split * tokens * rows
    if workspace is None:
        return torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
    fits = workspace.dtype == torch.float32 and workspace.numel() >= size
    if not fits or not workspace.is_contiguous():
        raise LoweringError(
            f"the workspace is {workspace.dtype} of {workspace.numel()} elements",
            where=where,
            next_step=f"pass at least {size} contiguous float32 elements, or None",
        )
    return workspace.view(-1)[:size].view(split, tokens, rows)
