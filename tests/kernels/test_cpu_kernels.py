"""Every CPU kernel that this machine can run, against a dense product in float64."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpu import (
    SETS,
    TYPES,
    check,
    kernels,
    library,
    linears,
    random_weight,
    serves,
)
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import BitmaskWeight, pack_bitmask
from zeroskip.runtime.kernels.library import CpuLinear, ThreadPool

SHAPES = [(1, 1), (3, 63), (6, 65), (17, 200), (70, 321)]
TOKENS = (1, 2, 3, 4, 5, 16, 35)


def levels(dtype: str) -> tuple[int, ...]:
    return (0, 4) if dtype == "int8" else (0,)


def compare(
    weight: BitmaskWeight,
    level: int,
    tokens: tuple[int, ...],
    sets: tuple[str | None, ...] = (None,),
) -> set[str]:
    """Runs a weight with every kernel and as the library chooses; returns the kernels that ran."""
    pool, ran = ThreadPool(library(), 2), set()
    made = linears(weight, level, sets)
    for m in tokens:
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(m, weight.columns, generator=generator)
        bias = torch.randn(weight.rows, generator=generator)
        for linear in made:
            if serves(linear, m):
                name = linear.kernel(m)
                ran.add(name)
                check(linear(x, bias), weight, x, bias, level, (name, m))
                check(linear(x, None, pool), weight, x, None, level, (name, m, "two threads"))
    return ran


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_has_kernels(name: str) -> None:
    """Skips, so that a report names it, where no test of this file runs kernels of a set."""
    sets = library().zs_instruction_sets().decode().split()
    assert set(sets) <= set(SETS)
    assert sets[-1] == "portable"
    if name not in sets:
        pytest.skip(f"this CPU or build has no {name}: its kernels are not tested here")
    assert any(kernel.startswith(f"{name}-") for kernel in kernels()), (name, kernels())


def test_every_kernel_is_reached_by_the_tests() -> None:
    ran = set()
    for dtype in TYPES:
        for density in (0.5, 0.05):
            for level in levels(dtype):
                ran |= compare(random_weight(64, 256, density, dtype), level, (1, 16, 64))
    assert ran == set(kernels())


@pytest.mark.parametrize("dtype", TYPES)
def test_every_instruction_set_answers(dtype: str) -> None:
    for level in levels(dtype):
        compare(random_weight(20, 130, 0.5, dtype), level, (1, 3, 8, 40), SETS)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, "2:4", 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], density: float | str, dtype: str) -> None:
    for level in levels(dtype):
        compare(random_weight(*shape, density, dtype), level, TOKENS)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("span", [8, 16])
@pytest.mark.parametrize("uneven", [None, 0, 1])
def test_weights_that_keep_half_of_each_few(uneven: int | None, span: int, dtype: str) -> None:
    # 4 of each 8 throughout, as in 2:4, and 8 of each 16 have paths of their own; a weight as large
    # that is uneven once, by a column that moved `span` away, must not take them.
    plain = random_weight(6, 128, "2:4", dtype)
    weight, keep = plain.unpack(), plain.keep()
    if uneven is not None:
        row = keep[-1, 64 * uneven :]
        here, there = row[:span].nonzero()[0], (~row[span : 2 * span]).nonzero()[0] + span
        row[here], row[there] = False, True
        weight[-1, 64 * uneven + int(there)] = 1.0
    again = pack_bitmask(
        weight, keep, dtype=TYPES[dtype], scales=plain.scales, block_size=plain.block_size
    )
    assert again.kept == plain.kept == 6 * 64
    for level in levels(dtype):
        compare(again, level, TOKENS)


@pytest.mark.parametrize("block_size", [64, 128, 640])
def test_block_scales(block_size: int) -> None:
    for columns in (64, 100, 577):
        weight = random_weight(9, columns, 0.5, "int8", block_size)
        for level in (0, 4):
            compare(weight, level, (1, 3, 20))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_no_rows_or_no_columns(shape: tuple[int, int], dtype: str) -> None:
    for level in levels(dtype):
        compare(random_weight(*shape, 0.5, dtype), level, (1, 20))


@pytest.mark.parametrize("dtype", TYPES)
def test_no_tokens(dtype: str) -> None:
    weight = random_weight(4, 70, 0.5, dtype)
    for linear in linears(weight, 0):
        assert linear(torch.zeros(0, 70)).shape == (0, 4)


@pytest.mark.parametrize("dtype", TYPES)
def test_more_columns_than_16_bits_count(dtype: str) -> None:
    weight = random_weight(3, 65536 + 4097, 0.5, dtype)
    for level in levels(dtype):
        compare(weight, level, (1, 5))


def test_the_largest_products_do_not_overflow() -> None:
    """127 * 255 in every one of 100000 columns, with all weights kept."""
    columns = 100_000
    weight = random_weight(2, columns, 1.0, "int8")
    weight.values[: weight.kept] = 127
    x = torch.ones(2, columns)
    x[1] = -1
    for linear in linears(weight, 4):
        if serves(linear, 2):
            check(linear(x), weight, x, None, 4, linear.kernel(2))


@pytest.mark.parametrize("dtype", TYPES)
def test_infinities_and_nans_answer_as_the_dense_product_does(dtype: str) -> None:
    """A pruned weight times infinity is NaN; with 8-bit activations the whole row is."""
    # Some kernels look for them in parts of 256 columns.
    for columns, m in ((130, 1), (130, 4), (130, 40), (700, 40)):
        weight = random_weight(20, columns, 0.3, dtype)
        for level in levels(dtype):
            x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1))
            for row, special in enumerate((torch.inf, -torch.inf, torch.nan)):
                if row * 2 < m:
                    x[row * 2, (columns - 1) * (3 - row) // 3] = special
            for linear in linears(weight, level):
                if serves(linear, m):
                    check(linear(x), weight, x, None, level, (linear.kernel(m), m))


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 300),
    m=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.03, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(list(TYPES)),
    block_size=st.sampled_from([0, 64, 192]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(
    rows: int, columns: int, m: int, density: float, dtype: str, block_size: int, seed: int
) -> None:
    weight = random_weight(rows, columns, density, dtype, block_size, seed)
    for level in levels(dtype):
        compare(weight, level, (m,))


def test_leading_dimensions_and_strides_of_x() -> None:
    weight = random_weight(7, 65, 0.5, "float32")
    linear = CpuLinear(library(), weight)
    x = torch.randn(3, 65, 2).transpose(1, 2)
    check(linear(x).reshape(6, 7), weight, x.reshape(6, 65), None, 0, "3-D")


def test_many_threads_share_one_linear_and_one_pool() -> None:
    weight = random_weight(300, 200, 0.5, "float32")
    pool = ThreadPool(library(), 3)
    for linear in linears(weight, 0, (None,)):
        if not serves(linear, 16):
            continue
        x = torch.randn(6, 16, 200)
        wanted = [linear(part) for part in x]
        wrong: list[int] = []

        def run(
            first: int,
            linear: CpuLinear = linear,
            x: torch.Tensor = x,
            wanted: list[torch.Tensor] = wanted,
            wrong: list[int] = wrong,
        ) -> None:
            for i in range(first, first + 6):
                got = linear(x[i % 6], None, pool if i % 2 else None)
                if not torch.equal(got, wanted[i % 6]):
                    wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, linear.kernel(16)


def test_a_kernel_that_cannot_take_so_many_rows_says_so() -> None:
    weight = random_weight(4, 70, 0.5, "float32")
    for linear in linears(weight, 0):
        if not serves(linear, 50):
            with pytest.raises(LoweringError, match="no kernel takes 50 rows"):
                linear(torch.zeros(50, 70))


def test_unknown_names_are_refused() -> None:
    weight = random_weight(2, 2, 0.5, "float32")
    with pytest.raises(LoweringError, match="unknown instruction set"):
        CpuLinear(library(), weight, instruction_set="avx1024")
    with pytest.raises(LoweringError, match="no kernel serves this weight: quantum"):
        CpuLinear(library(), weight, kernel="quantum")
