"""The sparse operators of zeroskip: schema, reference semantics, fake kernel, gradient."""

from __future__ import annotations

from typing import Any

import torch

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
