"""The repaired interpreter, bit for bit against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.gpu.interpreter import repair

repair()

SIZE = 1024
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
OTHERS = (torch.int32, torch.int16, torch.float64)


@triton.jit
def cast_kernel(source_ptr, target_ptr, size: tl.constexpr):
    place = tl.arange(0, size)
    value = tl.load(source_ptr + place)
    tl.store(target_ptr + place, value.to(target_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, size: tl.constexpr):
    place = tl.arange(0, size)
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(out_ptr + place, a * b + a)


@triton.jit
def comparison_kernel(a_ptr, b_ptr, out_ptr, count, size: tl.constexpr):
    place = tl.arange(0, size)
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    # A vector of int1 and a scalar of int1.
    keep = (a < b) & (count > 0)
    tl.store(out_ptr + place, keep.to(tl.int8))


@triton.jit
def _double(value):
    return value + value


@triton.jit
def nested_kernel(a_ptr, out_ptr, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out_ptr + place, _double(_double(tl.load(a_ptr + place))))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, size: tl.constexpr):
    place = tl.arange(0, size)
    grid = place[:, None] * size + place[None, :]
    total = tl.zeros((size, size), tl.float32)
    tl.store(out_ptr + grid, tl.dot(tl.load(a_ptr + grid), tl.load(b_ptr + grid), total))


def numbers(seed: int = 0) -> torch.Tensor:
    """Returns float32 of all magnitudes, ties between bfloat16 neighbours, and what is special."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(SIZE, generator=generator) * 10.0 ** torch.randint(
        -6, 5, (SIZE,), generator=generator
    )
    values[:8] = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 1]
    )
    return values


def same_bits(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = integer[actual.element_size()]
    return bool((actual.view(kind) == wanted.view(kind)).all())


@pytest.mark.parametrize("source", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("target", FLOAT_TYPES, ids=str)
def test_casts_between_floats(source: torch.dtype, target: torch.dtype) -> None:
    values, cast = numbers().to(source), torch.empty(SIZE, dtype=target)
    cast_kernel[(1,)](values, cast, size=SIZE)
    assert same_bits(cast, values.to(target))


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_casts_of_bfloat16_and_other_types(other: torch.dtype) -> None:
    values = torch.randint(-30000, 30000, (SIZE,)).to(other)
    cast, back = torch.empty(SIZE, dtype=torch.bfloat16), torch.empty(SIZE, dtype=other)
    cast_kernel[(1,)](values, cast, size=SIZE)
    assert same_bits(cast, values.to(torch.bfloat16))
    cast_kernel[(1,)](cast, back, size=SIZE)
    assert same_bits(back, cast.to(other))


def test_nan_stays_nan() -> None:
    values, cast = torch.full((SIZE,), torch.nan), torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](values, cast, size=SIZE)
    assert cast.isnan().all()


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_arithmetic(dtype: torch.dtype) -> None:
    a, b = numbers(1).clamp(-100, 100).to(dtype), numbers(2).clamp(-100, 100).to(dtype)
    out = torch.empty(SIZE, dtype=dtype)
    arithmetic_kernel[(1,)](a, b, out, size=SIZE)
    assert same_bits(out, a * b + a)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_comparisons_are_masks(dtype: torch.dtype) -> None:
    a, b = numbers(1).to(dtype), numbers(2).to(dtype)
    out = torch.empty(SIZE, dtype=torch.int8)
    comparison_kernel[(1,)](a, b, out, 3, size=SIZE)
    assert torch.equal(out.bool(), a < b)


def test_nested_functions() -> None:
    a, out = numbers(3).bfloat16(), torch.empty(SIZE, dtype=torch.bfloat16)
    nested_kernel[(1,)](a, out, size=SIZE)
    assert same_bits(out, (a + a) + (a + a))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_dot(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, size=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
