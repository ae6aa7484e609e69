"""The sparse operators of zeroskip: schema, reference semantics, fake kernel, gradient."""

from __future__ import annotations

from typing import Any

import torch

from zeroskip.ir.formats import BitmaskWeight
from zeroskip.ir.weights import unpack_bits


@torch.library.custom_op("zeroskip::masked_linear", mutates_args=())
def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask_bits: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y = x (W * mask)^T + b: a linear whose zeros are held apart, so that they can be swapped.

    Args:
        x: [..., in].
        weight: [out, in], of the dtype of x.
        mask_bits: uint8 [ceil(out * in / 8)], as `zeroskip.ir.weights.pack_bits` makes it: row
            by row, 8 weights a byte, the first in the lowest bit; a set bit keeps the weight.
        bias: [out] or None.

    Returns:
        [..., out].
    """
    return torch.nn.functional.linear(x, _masked(weight, mask_bits), bias)


def _masked(weight: torch.Tensor, mask_bits: torch.Tensor) -> torch.Tensor:
    return weight.masked_fill(~unpack_bits(mask_bits, weight.shape), 0)


@masked_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask_bits: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {x.shape[-1]} wide, the weight {weight.shape[1]}")
    if mask_bits.dtype != torch.uint8:
        raise TypeError(f"mask_bits is {mask_bits.dtype}, not uint8")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, mask_bits, *bias = inputs  # The dispatcher drops a bias that is None.
    ctx.save_for_backward(x, weight, mask_bits)
    ctx.has_bias = bool(bias) and bias[0] is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, mask_bits = ctx.saved_tensors
    needs_x, needs_weight, _, *needs_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = grad @ _masked(weight, mask_bits) if needs_x else None
    grad_weight = None
    if needs_weight:
        # Pruned weights get no gradient: training keeps the mask.
        grad_weight = _masked(rows.T @ x.reshape(-1, x.shape[-1]), mask_bits)
    grad_bias = rows.sum(0) if any(needs_bias) and ctx.has_bias else None
    return (grad_x, grad_weight, None, grad_bias)[: len(ctx.needs_input_grad)]


masked_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("zeroskip::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    block_size: int = 0,
    accuracy_level: int = 0,
    layout: int = 0,
) -> torch.Tensor:
    """Y = x W^T + b with W in the bitmask format of `zeroskip.ir.formats`.

    This is what the operator means; `zeroskip.runtime.kernels.sparse_linear` makes it fast.

    Args:
        x: [..., in].
        bitmask: uint8 [out, 8 * ceil(in / 64)].
        row_offsets: int64 [out + 1].
        values: [kept + 64] of float32, float16, bfloat16 or int8.
        scales: float32 [out, blocks] of int8 values, else None.
        bias: [out] or None.
        in_features: Columns of W.
        block_size: Columns that share a scale; 0 for the whole row.
        accuracy_level: 4 rounds each row of x to 8 bits first (int8 values only); 0 does not.
        layout: 1 lets kernels repack the weight for many tokens; it changes no result.

    Returns:
        [..., out], of the dtype of x.
    """
    weight = BitmaskWeight(bitmask, row_offsets, values, scales, in_features, block_size)
    return sparse_linear_reference(x, weight, bias, accuracy_level)


def sparse_linear_reference(
    x: torch.Tensor, weight: BitmaskWeight, bias: torch.Tensor | None, accuracy_level: int
) -> torch.Tensor:
    """Computes `sparse_linear` through the dense weight, in float32."""
    rows = x.float()
    if accuracy_level == 4 and weight.values.dtype == torch.int8:
        rows = _round_rows(rows)
    offset = None if bias is None else bias.float()
    return torch.nn.functional.linear(rows, weight.unpack().to(x.device), offset).to(x.dtype)


def _round_rows(x: torch.Tensor) -> torch.Tensor:
    """Rounds each row to 256 steps between its extremes and zero, as DynamicQuantizeLinear does."""
    if x.numel() == 0:
        return x
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    step = ((high.double() - low.double()) / 255).float()
    step = torch.where(step > 0, step, torch.where(step == 0, 1.0, torch.nan))
    zero = (-low / step).round().clamp(0, 255)
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


@sparse_linear.register_fake
def _(
    x: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    block_size: int = 0,
    accuracy_level: int = 0,
    layout: int = 0,
) -> torch.Tensor:
    if x.shape[-1] != in_features:
        raise ValueError(f"x is {x.shape[-1]} wide, the weight {in_features}")
    if bitmask.dtype != torch.uint8 or bitmask.shape[1] != -(-in_features // 64) * 8:
        raise TypeError(f"a bitmask of {tuple(bitmask.shape)} {bitmask.dtype}")
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))
