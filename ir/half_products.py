"""Products of half-precision tensors on a processor that has no instructions for them.

There torch multiplies bfloat16 and float16 element by element, several times slower than float32. A
product that is computed in float32 and rounded once at the end is what the instructions would give,
up to the order of the additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
    }
)


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies this type more slowly than float32."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def gains_by_float32(target: object, args: Sequence[Any]) -> bool:
    """Whether an operator is a product of half-precision tensors that float32 computes faster."""
    if target not in _PRODUCTS or not args or not isinstance(args[0], torch.Tensor):
        return False
    return args[0].device.type == "cpu" and is_slow(args[0].dtype)


def in_float32(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Computes such a product in float32; returns it in the type of its first argument.

    Args:
        target: The operator.
        args: As the operator takes them.
        kwargs: Likewise.
    """
    dtype = args[0].dtype

    def widened(value: Any) -> Any:
        same = isinstance(value, torch.Tensor) and value.dtype == dtype
        return value.float() if same else value

    found: torch.Tensor = target(*map(widened, args), **{k: widened(v) for k, v in kwargs.items()})
    return found.to(dtype)
