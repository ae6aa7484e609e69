"""The CPU kernels behind `zeroskip::sparse_linear` in eager PyTorch: what is remembered of a weight."""

from __future__ import annotations

import pytest
import torch

from zeroskip.ir.formats import BitmaskWeight, pack_bitmask
from zeroskip.ir.ops import sparse_linear, sparse_linear_reference
from zeroskip.runtime.kernels import sparse_linear as _kernels  # noqa: F401  (registers them)


def multiply(x: torch.Tensor, weight: BitmaskWeight, layout: int) -> torch.Tensor:
    operands = (weight.bitmask, weight.row_offsets, weight.values, weight.scales)
    return sparse_linear(x, *operands, None, weight.columns, 0, 0, layout)


@pytest.mark.parametrize("layout", [0, 1])
def test_a_weight_written_in_place_is_read_again(layout: int) -> None:
    torch.manual_seed(0)
    weight = pack_bitmask(torch.randn(512, 512) * (torch.rand(512, 512) > 0.5))
    x = torch.randn(64, 512)
    multiply(x, weight, layout)
    weight.values.mul_(-3)
    expected = sparse_linear_reference(x, weight, None, 0)
    torch.testing.assert_close(multiply(x, weight, layout), expected, atol=1e-3, rtol=1e-4)
