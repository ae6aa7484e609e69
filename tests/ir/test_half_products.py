from __future__ import annotations

import pytest
import torch
from torch import nn

from zeroskip.ir import half_products
from zeroskip.ir.capture import capture
from zeroskip.ir.half_products import gains_by_float32, in_float32, is_slow

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)


def operands(dtype: torch.dtype) -> dict[object, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = (drawn(1, 2, 5, 8), drawn(1, 2, 5, 8), drawn(1, 2, 5, 8))
    return {
        aten.linear.default: (drawn(3, 16), drawn(7, 16), drawn(7)),
        aten.matmul.default: (drawn(2, 3, 16), drawn(16, 5)),
        aten.mm.default: (drawn(3, 16), drawn(16, 5)),
        aten.bmm.default: (drawn(2, 3, 16), drawn(2, 16, 5)),
        aten.addmm.default: (drawn(5), drawn(3, 16), drawn(16, 5)),
        aten.baddbmm.default: (drawn(2, 3, 5), drawn(2, 3, 16), drawn(2, 16, 5)),
        aten.scaled_dot_product_attention.default: heads,
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("target", list(operands(torch.float32)), ids=str)
def test_the_product_is_rounded_once_at_the_end(target, dtype):
    args = operands(dtype)[target]
    found = in_float32(target, args, {})
    exact = target(*(value.double() for value in args))
    assert found.dtype == dtype
    # Half a unit of the last place, and what float32 adds to it.
    unit = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= 0.51 * unit * exact.abs() + 1e-5).all()


def test_only_slow_products_of_halves_are_widened(monkeypatch):
    monkeypatch.setattr(half_products, "is_slow", lambda dtype: dtype == torch.bfloat16)
    half, single = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    assert gains_by_float32(aten.linear.default, (half, half))
    assert not gains_by_float32(aten.linear.default, (single, single))
    assert not gains_by_float32(aten.linear.default, (half.half(), half.half()))
    assert not gains_by_float32(aten.add.Tensor, (half, half))
    assert not gains_by_float32(aten.linear.default, ())
    meta = half.to("meta")
    assert not gains_by_float32(aten.linear.default, (meta, meta))


def test_float32_and_integers_are_never_slow():
    assert not is_slow(torch.float32)
    assert not is_slow(torch.int8)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_program_computes_as_its_module_does(monkeypatch, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 6)).to(dtype).eval()
    inputs = {"input": torch.randn(3, 16).to(dtype)}
    program = capture(module, inputs)
    results = []
    for slow in (False, True):
        monkeypatch.setattr(half_products, "is_slow", lambda _, slow=slow: slow)
        results.append(next(iter(program.run(inputs).values())))
    native, widened = results
    assert widened.dtype == dtype
    exact = module.double()(inputs["input"].double())
    scale = torch.finfo(dtype).eps * exact.abs().max()
    assert (widened.double() - exact).abs().max() <= 4 * scale
    assert (native.double() - exact).abs().max() <= 8 * scale
