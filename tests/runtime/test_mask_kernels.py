"""`masked_linear` and `bitmap_linear` on CUDA: what is remembered and what falls back; and on a device."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from zeroskip.ir.bitmap import pack_bitmap
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import pack_bits, unpack_bits
from zeroskip.runtime.kernels import bitmap_linear as bitmap
from zeroskip.runtime.kernels import masked_linear as masked

HALF = torch.bfloat16
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def problem(
    tokens: int, columns: int = 128, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns x, a weight of 70 rows, its mask and a bias; the first tile of the weight is empty."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(HALF)
        for shape in ((tokens, columns), (70, columns), (70,))
    )
    keep = torch.rand(70, columns, generator=generator) < 0.4
    keep[:64, :64] = False
    return x.to(device), weight.to(device), keep.to(device), bias.to(device)


def product(x: Any, weight: Any, keep: Any, bias: Any) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight.masked_fill(~keep, 0), bias)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts a reference, which reads what the kernels read, in place of their launches."""
    pytest.importorskip("triton")
    from zeroskip.runtime.kernels.gpu import bitmap_gemv, masked_gemm

    seen: list[Any] = []

    def launch_masked(x: Any, operands: Any, bias: Any, config: Any) -> torch.Tensor:
        seen.append((operands, config))
        keep = unpack_bits(operands.mask.flatten(), (70, 8 * operands.mask.shape[1]))
        return product(x, operands.weight, keep[:, : x.shape[1]], bias)

    def launch_bitmap(x: Any, weight: Any, bias: Any, config: Any) -> torch.Tensor:
        seen.append((weight, config))
        return torch.nn.functional.linear(x, weight.unpack(), bias)

    monkeypatch.setattr(masked_gemm, "launch", launch_masked)
    monkeypatch.setattr(bitmap_gemv, "launch", launch_bitmap)
    return seen


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64, 65])
def test_few_tokens_of_a_masked_weight_go_to_the_kernel(
    launches: list[Any], tokens: int, columns: int
) -> None:
    x, weight, keep, bias = problem(tokens, columns)
    y = masked.multiply(x[None], weight, pack_bits(keep), bias)
    torch.testing.assert_close(y[0], product(x, weight, keep, bias))
    assert bool(launches) == (0 < tokens <= masked.MOST_TOKENS)
    if launches:
        (_, config), *_ = launches
        assert (config.tokens, config.skips) == (16 if tokens <= 16 else 64, True)


def test_a_mask_is_read_once_and_again_when_it_was_written(launches: list[Any]) -> None:
    x, weight, keep, bias = problem(1)
    bits = pack_bits(keep)
    for _ in range(2):
        masked.multiply(x, weight, bits, bias)
    (first, _), (second, _) = launches
    assert first.mask is second.mask
    other = weight * 2  # A trained weight under the same mask.
    torch.testing.assert_close(masked.multiply(x, other, bits, bias), product(x, other, keep, bias))
    bits.copy_(pack_bits(~keep))
    torch.testing.assert_close(
        masked.multiply(x, weight, bits, bias), product(x, weight, ~keep, bias)
    )


@pytest.mark.parametrize("columns", [128, 100])
def test_a_mask_that_is_gone_is_forgotten(launches: list[Any], columns: int) -> None:
    x, weight, keep, _ = problem(1, columns)
    bits, packed = pack_bits(keep), pack_bitmap(weight, keep)
    gc.collect()
    before = len(masked._tiles), len(bitmap._checked)
    masked.multiply(x, weight, bits)
    bitmap.multiply(x, packed.bits, packed.starts, packed.values)
    launches.clear()
    assert (len(masked._tiles), len(bitmap._checked)) == (before[0] + 1, before[1] + 1)
    del bits, packed
    gc.collect()
    assert (len(masked._tiles), len(bitmap._checked)) == before


@pytest.mark.parametrize("error", [ImportError("no triton"), LoweringError("another dtype")])
def test_what_the_kernel_cannot_do_is_computed_densely(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(masked, "_launch", fails)
    monkeypatch.setattr(bitmap, "_launch", fails)
    x, weight, keep, bias = problem(3)
    expected = product(x, weight, keep, bias)
    torch.testing.assert_close(masked.multiply(x, weight, pack_bits(keep), bias), expected)
    packed = pack_bitmap(weight, keep)
    found = bitmap.multiply(x, packed.bits, packed.starts, packed.values, bias)
    torch.testing.assert_close(found, expected)


def test_float32_is_computed_densely(launches: list[Any]) -> None:
    x, weight, keep, bias = (t if t.dtype == torch.bool else t.float() for t in problem(3))
    expected = product(x, weight, keep, bias)
    torch.testing.assert_close(masked.multiply(x, weight, pack_bits(keep), bias), expected)
    assert not launches


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17])
def test_few_tokens_of_a_bitmap_go_to_the_kernel(launches: list[Any], tokens: int) -> None:
    x, weight, keep, bias = problem(tokens)
    packed = pack_bitmap(weight, keep)
    y = bitmap.multiply(x[None], packed.bits, packed.starts, packed.values, bias)
    torch.testing.assert_close(y[0], product(x, weight, keep, bias))
    assert bool(launches) == (tokens <= bitmap.MOST_TOKENS)
    if launches:
        assert launches[0][1].tokens == {1: 1, 2: 2, 3: 4, 4: 4}.get(tokens, 16)


def test_a_bitmap_that_contradicts_itself_never_reaches_the_kernel(launches: list[Any]) -> None:
    x, weight, keep, _ = problem(1)
    packed = pack_bitmap(weight, keep)
    bitmap.multiply(x, packed.bits, packed.starts, packed.values)
    packed.starts[3] += 1
    with pytest.raises(LoweringError, match="bits are set"):
        bitmap.multiply(x, packed.bits, packed.starts, packed.values)
    assert len(launches) == 1


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 64, 200])
@pytest.mark.parametrize("columns", [128, 100, 4096])
@pytest.mark.parametrize("operator", ["masked", "bitmap"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_on_a_device(device: str, operator: str, columns: int, tokens: int) -> None:
    x, weight, keep, bias = problem(tokens, columns, device)
    expected = product(x, weight, keep, bias)
    for _ in range(2):
        if operator == "masked":
            found = torch.ops.zeroskip.masked_linear(x, weight, pack_bits(keep), bias)
        else:
            packed = pack_bitmap(weight, keep)
            found = torch.ops.zeroskip.bitmap_linear(
                x, packed.bits, packed.starts, packed.values, bias
            )
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
