"""`zeroskip::bitmap_linear` on CUDA: a Triton kernel for up to 16 tokens.

Importing this module registers it. More tokens, float32, and machines without Triton get the dense
computation. The kernel reads values where the bits and starts send it: that they go together is
checked once for each tensor of bits, and again when it or the starts were written into.
"""

from __future__ import annotations

import threading

import torch
from torch.utils.weak import WeakIdKeyDictionary

from zeroskip.ir.bitmap import BitmapWeight
from zeroskip.ir.bitmap_linear import bitmap_linear, check_operands
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.linear_24 import as_rows

MOST_TOKENS = 16

_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


@bitmap_linear.register_kernel("cuda")
def multiply(
    x: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `zeroskip::bitmap_linear`: by the kernel for few tokens, else through the dense weight."""
    columns = x.shape[-1]
    check_operands(x, columns, bits, starts, values, bias)
    weight = BitmapWeight(bits, starts, values.detach(), columns)
    rows = as_rows(x)
    if 0 < rows.shape[0] <= MOST_TOKENS and not (bits.is_inference() or starts.is_inference()):
        _check_once(weight)
        try:
            return _launch(rows, weight, bias).reshape(*x.shape[:-1], weight.rows)
        except (ImportError, LoweringError):
            pass  # No Triton, or operands that the kernel does not take.
    return torch.nn.functional.linear(x, weight.unpack(), bias)


def _launch(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from zeroskip.runtime.kernels.gpu import bitmap_gemv

    config = next(each for each in bitmap_gemv.CONFIGS if each.tokens >= x.shape[0])
    return bitmap_gemv.launch(x, weight, bias, config)


def _check_once(weight: BitmapWeight) -> None:
    """Refuses, as `unpack` does, bits and starts that do not belong to the values."""
    starts = weight.starts
    found = (weight.columns, weight.kept, weight.bits._version, starts._version)
    with _lock:
        held = _checked.get(weight.bits)  # type: ignore[no-untyped-call]
        if held is None or held[0] != found or held[1] is not starts:
            weight.unpack()
            _checked[weight.bits] = (found, starts)
