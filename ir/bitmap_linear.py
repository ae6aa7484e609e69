"""`zeroskip::bitmap_linear`, a linear over an unstructured weight: schema, reference, gradient.

The weight is in the format of `zeroskip.ir.bitmap`, which kernels for GPUs read; it does not know its
own width, so that is the width of x. The gradient of x is an operator of its own, so that it too can
have kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from zeroskip.ir.bitmap import SEGMENT, BitmapWeight, unpack_words
from zeroskip.ir.linear_24 import as_rows, check_alike


@torch.library.custom_op("zeroskip::bitmap_linear", mutates_args=())
def bitmap_linear(
    x: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y = x W^T + b with W in the bitmap format.

    This computes through the dense weight. x, bias and values can have gradients; training the values
    keeps the mask.

    Args:
        x: [..., in], of the dtype of the values.
        bits: int32 [out, 2 * ceil(in / 64)].
        starts: int32 [out, ceil(in / 64)].
        values: [kept + 64].
        bias: [out] or None, of the same dtype.

    Returns:
        [..., out].

    Raises:
        TypeError: Dtypes do not go together; names them.
        ValueError: Shapes or devices do not go together. A width that differs within the last 64
            columns shows only if bits beyond it are set.
        LoweringError: The bits, the starts and the values contradict each other.
    """
    check_operands(x, x.shape[-1], bits, starts, values, bias)
    weight = BitmapWeight(bits, starts, values, x.shape[-1])
    return torch.nn.functional.linear(x, weight.unpack(), bias)


@bitmap_linear.register_fake
def _(
    x: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check_operands(x, x.shape[-1], bits, starts, values, bias)
    return x.new_empty((*x.shape[:-1], bits.shape[0]))


@torch.library.custom_op("zeroskip::bitmap_linear_dx", mutates_args=())
def bitmap_linear_dx(
    grad: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """The gradient of x in `bitmap_linear`: grad W.

    Args:
        grad: [..., out], of the dtype of the values.
        bits: As for `bitmap_linear`.
        starts: As for `bitmap_linear`.
        values: As for `bitmap_linear`.
        columns: The width of x.

    Returns:
        [..., columns].
    """
    _check_gradient(grad, bits, starts, values, columns)
    return grad @ BitmapWeight(bits, starts, values, columns).unpack()


@bitmap_linear_dx.register_fake
def _(
    grad: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    _check_gradient(grad, bits, starts, values, columns)
    return grad.new_empty((*grad.shape[:-1], columns))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bits, starts, values, *bias = inputs  # The dispatcher drops a bias that is None.
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, bits, starts, values)
    ctx.columns, ctx.has_bias = x.shape[-1], bool(bias) and bias[0] is not None


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bits, starts, values = ctx.saved_tensors
    needs_x, _, _, needs_values, *needs_bias = ctx.needs_input_grad
    grad_x = bitmap_linear_dx(grad, bits, starts, values, ctx.columns) if needs_x else None
    grad_values = _gradient_of_values(grad, x, bits, values) if needs_values else None
    grad_bias = as_rows(grad).sum(0) if ctx.has_bias and any(needs_bias) else None
    return (grad_x, None, None, grad_values, grad_bias)[: len(ctx.needs_input_grad)]


bitmap_linear.register_autograd(_linear_backward, setup_context=_setup_linear)


def _setup_dx(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, bits, starts, values, _ = inputs
    ctx.save_for_backward(grad if ctx.needs_input_grad[3] else None, bits, starts, values)


def _dx_backward(ctx: Any, grad_x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad, bits, starts, values = ctx.saved_tensors
    needs_grad, _, _, needs_values, _ = ctx.needs_input_grad
    again = bitmap_linear(grad_x, bits, starts, values) if needs_grad else None
    grad_values = _gradient_of_values(grad, grad_x, bits, values) if needs_values else None
    return again, None, None, grad_values, None


bitmap_linear_dx.register_autograd(_dx_backward, setup_context=_setup_dx)


def _gradient_of_values(
    grad: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    dense = as_rows(grad).T @ as_rows(x)
    keep = unpack_words(bits)[:, : dense.shape[1]]
    # Indices instead of dense[keep], whose shape a trace could not know. One kept weight falls on
    # each place, and zeros for those that are not kept, so the sum is exact in any order.
    places = (keep.flatten().cumsum(0) - 1).clamp(min=0)
    return torch.zeros_like(values).index_add(0, places, dense.masked_fill(~keep, 0).flatten())


def _check_gradient(
    grad: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    columns: int,
) -> None:
    check_operands(grad, columns, bits, starts, values, None)
    if grad.shape[-1] != bits.shape[0]:
        raise ValueError(f"grad is {grad.shape[-1]} wide, the weight has {bits.shape[0]} rows")


def check_operands(
    x: torch.Tensor,
    columns: int,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Refuses operands of `bitmap_linear` that do not go together; reads no data.

    Args:
        x: What is multiplied: the input, or the gradient of the output.
        columns: The width of the input.
        bits: As for `bitmap_linear`.
        starts: As for `bitmap_linear`.
        values: As for `bitmap_linear`.
        bias: As for `bitmap_linear`.

    Raises:
        TypeError: Names both dtypes.
        ValueError: Names both shapes or devices.
    """
    check_alike(x, values, bias, bits=bits, starts=starts)
    for name, tensor, dimensions in (
        ("bits", bits, 2),
        ("starts", starts, 2),
        ("values", values, 1),
    ):
        if tensor.dim() != dimensions:
            raise ValueError(f"{name} have {tensor.dim()} dimensions, not {dimensions}")
        if name != "values" and tensor.dtype != torch.int32:
            raise TypeError(f"{name} are {tensor.dtype}, not torch.int32")
    segments = -(-columns // SEGMENT)
    if bits.shape[1] != 2 * segments:
        raise ValueError(f"x is {columns} wide, the bits are {32 * bits.shape[1]}")
    if tuple(starts.shape) != (bits.shape[0], segments):
        raise ValueError(f"starts are {tuple(starts.shape)}, bits {tuple(bits.shape)}")
    if bias is not None and tuple(bias.shape) != (bits.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, the weight has {bits.shape[0]} rows")
