"""`zeroskip::linear_24`, a linear over a 2:4 weight: schema, reference, fake kernel, gradient.

The weight is canonical (`zeroskip.ir.semi_structured`: 2-D values, uint8 codes) or in fragment form
(`zeroskip.ir.fragments`: 4-D values, int32 codes), which the kernels for GPUs read; the number of
dimensions of the values tells. A weight in fragment form does not know its own size: the number of
rows is an argument, the columns are the width of x.

The gradient of x is an operator of its own, so that it too can have kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import GROUP, SemiStructuredWeight, kept_columns


@torch.library.custom_op("zeroskip::linear_24", mutates_args=())
def linear_24(
    x: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: int = 0,
) -> torch.Tensor:
    """Y = x W^T + b with W in the 2:4 format.

    This computes through the dense weight. x, bias and canonical values can have gradients; those of
    a group's kept zeros too, so training them keeps the pattern. Values in fragment form cannot.

    Args:
        x: [..., in], of the dtype of the values.
        values: [out, in / 2], or fragments [out / 16, in / 32, 32, 8], sizes rounded up.
        codes: uint8 [out, in / 8], or int32 [out / 16, in / 256, 32, 4] with fragments.
        bias: [out] or None, of the same dtype.
        rows: The true number of rows with fragments; else 0 or that number.

    Returns:
        [..., out].

    Raises:
        TypeError: Dtypes do not go together; names them.
        ValueError: Shapes or devices do not go together.
        LoweringError: A code names no two columns in order.
    """
    check_operands(x, x.shape[-1], values, codes, bias, rows)
    weight = read_weight(values, codes, rows, x.shape[-1])
    return torch.nn.functional.linear(x, weight.unpack(), bias)


@linear_24.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: int = 0,
) -> torch.Tensor:
    check_operands(x, x.shape[-1], values, codes, bias, rows)
    return x.new_empty((*x.shape[:-1], rows or values.shape[0]))


@torch.library.custom_op("zeroskip::linear_24_dx", mutates_args=())
def linear_24_dx(
    grad: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, columns: int, rows: int = 0
) -> torch.Tensor:
    """The gradient of x in `linear_24`: grad W.

    Args:
        grad: [..., out], of the dtype of the values.
        values: As for `linear_24`.
        codes: As for `linear_24`.
        columns: The width of x.
        rows: As for `linear_24`.

    Returns:
        [..., columns].
    """
    _check_gradient(grad, values, codes, columns, rows)
    return grad @ read_weight(values, codes, rows, columns).unpack()


@linear_24_dx.register_fake
def _(
    grad: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, columns: int, rows: int = 0
) -> torch.Tensor:
    _check_gradient(grad, values, codes, columns, rows)
    return grad.new_empty((*grad.shape[:-1], columns))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, codes, *rest = inputs  # The dispatcher drops trailing defaults.
    bias = rest[0] if rest else None
    rows = rest[1] if len(rest) > 1 else 0
    needs_values = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_values else None, values, codes)
    ctx.columns, ctx.rows, ctx.has_bias = x.shape[-1], rows, bias is not None


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, codes = ctx.saved_tensors
    needs_x, needs_values, _, *rest = ctx.needs_input_grad
    grad_x = linear_24_dx(grad, values, codes, ctx.columns, ctx.rows) if needs_x else None
    grad_values = _gradient_of_values(grad, x, values, codes) if needs_values else None
    grad_bias = as_rows(grad).sum(0) if ctx.has_bias and rest[0] else None
    return (grad_x, grad_values, None, grad_bias, None)[: len(ctx.needs_input_grad)]


linear_24.register_autograd(_linear_backward, setup_context=_setup_linear)


def _setup_dx(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, values, codes, _, *rows = inputs
    ctx.save_for_backward(grad if ctx.needs_input_grad[1] else None, values, codes)
    ctx.rows = rows[0] if rows else 0


def _dx_backward(ctx: Any, grad_x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad, values, codes = ctx.saved_tensors
    needs_grad, needs_values, *_ = ctx.needs_input_grad
    again = linear_24(grad_x, values, codes, None, ctx.rows) if needs_grad else None
    grad_values = _gradient_of_values(grad, grad_x, values, codes) if needs_values else None
    return (again, grad_values, None, None, None)[: len(ctx.needs_input_grad)]


linear_24_dx.register_autograd(_dx_backward, setup_context=_setup_dx)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns [..., n] as [rows, n]; no -1, which nothing can be inferred for when n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _gradient_of_values(
    grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    if values.dim() != 2:
        raise LoweringError(
            "values in fragment form have no gradient",
            where="zeroskip::linear_24",
            next_step="train the canonical form, or call requires_grad_(False) on the values",
        )
    dense = as_rows(grad).T @ as_rows(x)
    return dense.gather(1, kept_columns(codes, dense.shape[1]))


def _check_gradient(
    grad: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, columns: int, rows: int
) -> None:
    check_operands(grad, columns, values, codes, None, rows)
    if grad.shape[-1] != (rows or values.shape[0]):
        raise ValueError(
            f"grad is {grad.shape[-1]} wide, the weight has {rows or values.shape[0]} rows"
        )


def read_weight(
    values: torch.Tensor, codes: torch.Tensor, rows: int, columns: int
) -> SemiStructuredWeight:
    """Returns the canonical weight that the operands of `linear_24` hold."""
    if values.dim() == 2:
        return SemiStructuredWeight(values, codes)
    from zeroskip.ir.fragments import from_fragments

    return from_fragments(values, codes, rows, columns)


def check_operands(
    x: torch.Tensor,
    columns: int,
    values: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
) -> None:
    """Refuses operands of `linear_24` that do not go together; reads no data.

    Args:
        x: What is multiplied: the input, or the gradient of the output.
        columns: The width of the input.
        values: As for `linear_24`.
        codes: As for `linear_24`.
        bias: As for `linear_24`.
        rows: As for `linear_24`.

    Raises:
        TypeError: Names both dtypes.
        ValueError: Names both shapes or devices.
    """
    check_alike(x, values, bias, codes=codes)
    if values.dim() == 2:
        _check_canonical(columns, values, codes, rows)
    elif values.dim() == 4:
        _check_fragments(columns, values, codes, rows)
    else:
        raise ValueError(f"values have {values.dim()} dimensions, not 2 or 4")
    out = rows or values.shape[0]
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias is {tuple(bias.shape)}, the weight has {out} rows")


def check_alike(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, **others: torch.Tensor
) -> None:
    """Refuses operands on two devices, and values or a bias of another dtype than x.

    Raises:
        TypeError: Names both dtypes.
        ValueError: Names both devices.
    """
    for name, tensor in {"values": values, "bias": bias, **others}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}")
    for name, same in {"values": values, "bias": bias}.items():
        if same is not None and same.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype}, {name} {same.dtype}")


def _check_canonical(columns: int, values: torch.Tensor, codes: torch.Tensor, rows: int) -> None:
    held, half = values.shape
    if columns != 2 * half:
        raise ValueError(f"x is {columns} wide, the weight {2 * half}")
    if rows not in (0, held):
        raise ValueError(f"rows is {rows}, the weight has {held}")
    _check_codes_are(codes, torch.uint8, (held, -(-half // 4)))


def _check_fragments(columns: int, values: torch.Tensor, codes: torch.Tensor, rows: int) -> None:
    if values.dtype.itemsize != 2:
        raise TypeError(f"fragments are float16 or bfloat16, not {values.dtype}")
    tiles, steps = values.shape[:2]
    if columns % GROUP or -(-columns // 32) != steps:
        raise ValueError(f"x is {columns} wide, the weight at most {32 * steps}, by steps of 32")
    if -(-rows // 16) != tiles or tuple(values.shape[2:]) != (32, 8):
        raise ValueError(f"rows is {rows}, the fragments are {tuple(values.shape)}")
    _check_codes_are(codes, torch.int32, (tiles, -(-steps // 8), 32, 4))


def _check_codes_are(codes: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if codes.dtype != dtype or tuple(codes.shape) != shape:
        raise TypeError(f"codes are {codes.dtype} {tuple(codes.shape)}, not {dtype} {shape}")
