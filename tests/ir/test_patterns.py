"""Patterns: projection equals a stable sort, counts are exact, violations are caught."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroskip.ir.errors import PatternError
from zeroskip.ir.patterns import (
    NM,
    Block,
    SparsityPattern,
    Unstructured,
    keep_largest,
    parse_pattern,
    pruned_count,
)

RATIOS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (2, 16), (15, 16), (16, 32), (3, 32)]
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.75, 0.999])
fast = settings(max_examples=30, deadline=None)


@st.composite
def scores(draw: st.DrawFn, rows: int = 6, columns: int = 40, multiple: int = 1) -> Tensor:
    """Few different values, so that ties are everywhere; -0.0 and 0.0 tie as well."""
    shape = (draw(st.integers(1, rows)), multiple * draw(st.integers(1, columns // multiple)))
    values = torch.tensor(draw(st.sampled_from([(0.0, -0.0, 1.0), (1.0, 2.0, 3.0, 1e-30), (7.0,)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return values[torch.randint(len(values), shape, generator=generator)]


def stable(row: list[float], pruned: int) -> list[bool]:
    """Python's sort is stable: of equal scores the first ones are pruned."""
    out = sorted(range(len(row)), key=lambda i: row[i])[:pruned]
    return [i not in out for i in range(len(row))]


def floor_of(share: float, n: int) -> int:
    return int(Fraction(str(share)) * n)


@fast
@given(scores(), SHARES)
def test_rows_equal_a_stable_sort(x: Tensor, share: float) -> None:
    expected = [stable(row, floor_of(share, x.shape[1])) for row in x.tolist()]
    keep = Unstructured(share).project(x)
    assert keep.tolist() == expected
    assert Unstructured(share).violation(keep) is None


@fast
@given(scores(), SHARES)
def test_a_matrix_equals_a_stable_sort(x: Tensor, share: float) -> None:
    pattern = Unstructured(share, "matrix")
    keep = pattern.project(x)
    assert keep.flatten().tolist() == stable(x.flatten().tolist(), floor_of(share, x.numel()))
    assert keep.shape == x.shape
    assert pattern.violation(keep) is None


@pytest.mark.parametrize(("n", "m"), RATIOS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_groups_equal_a_stable_sort(n: int, m: int, data: st.DataObject) -> None:
    x = data.draw(scores(columns=3 * m, multiple=m))
    keep = NM(n, m).project(x)
    for row, kept in zip(x.tolist(), keep.tolist(), strict=True):
        for start in range(0, len(row), m):
            assert kept[start : start + m] == stable(row[start : start + m], m - n)
    assert int(keep.sum()) == x.numel() // m * n
    assert NM(n, m).violation(keep) is None


@fast
@given(scores(), st.sampled_from(RATIOS))
def test_padding_lets_a_short_group_keep_its_n_best(x: Tensor, ratio: tuple[int, int]) -> None:
    n, m = ratio
    keep = NM(n, m, "pad").project(x)
    for row, kept in zip(x.tolist(), keep.tolist(), strict=True):
        for start in range(0, len(row), m):
            group = row[start : start + m]
            assert kept[start : start + m] == stable(group, max(0, len(group) - n))
    assert NM(n, m, "pad").violation(keep) is None


@fast
@given(scores(rows=2, columns=8), SHARES, st.integers(1, 3), st.integers(1, 3))
def test_blocks_equal_a_stable_sort_of_their_sums(
    sums: Tensor, share: float, rows: int, columns: int
) -> None:
    x = sums.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    pattern = Block(rows, columns, share)
    expected = torch.tensor(stable(sums.flatten().tolist(), floor_of(share, sums.numel())))
    blocks = expected.view(sums.shape)
    keep = pattern.project(x)
    assert torch.equal(keep, blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1))
    assert pattern.violation(keep) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_can_be_scored(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    assert NM(2, 4).project(x).tolist() == [[True, False, False, True, False, False, True, True]]
    assert keep_largest(x, 0.5).tolist() == [[True, True, True, True, False, False, False, False]]


# Violations: one weight more than the pattern allows

PATTERNS: list[SparsityPattern] = [
    Unstructured(0.5),
    Unstructured(0.3),
    Unstructured(0.5, "matrix"),
    NM(2, 4),
    NM(1, 4, "pad"),
    NM(5, 8),
    NM(16, 32),
    Block(2, 4, 0.5),
    Block(1, 8, 0.25),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_extra_weight_is_caught_wherever_it_is(pattern: SparsityPattern) -> None:
    x = torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
    keep = pattern.project(x)
    assert pattern.violation(keep) is None
    pruned = (~keep).nonzero().tolist()
    assert pruned
    for row, column in pruned:
        extra = keep.clone()
        extra[row, column] = True
        assert pattern.violation(extra) is not None, (row, column)
    assert pattern.violation(torch.zeros_like(keep)) is None


def test_a_violation_says_where() -> None:
    keep = torch.zeros(3, 8, dtype=torch.bool)
    keep[1, 4:7] = True
    assert NM(2, 4).violation(keep) == "row 1, group 1 keeps 3 of 4"


def test_an_extra_weight_in_a_short_group_is_caught() -> None:
    keep = torch.tensor([[True, True, False, False, True, True, True]])
    assert NM(2, 4, "pad").violation(keep) == "row 0, group 1 keeps 3 of 4"
    assert "not a multiple" in str(NM(2, 4).violation(keep))


# Refusals


@pytest.mark.parametrize(
    ("pattern", "shape", "reason"),
    [
        (NM(2, 4), (4, 30), "30 is not a multiple of 4"),
        (Block(3, 4, 0.5), (4, 8), "4x8 cannot be cut into 3x4"),
        (Block(2, 3, 0.5), (4, 8), "4x8 cannot be cut into 2x3"),
    ],
)
def test_shapes_that_do_not_fit(
    pattern: SparsityPattern, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(pattern.refusal(shape))
    with pytest.raises(PatternError, match=reason):
        pattern.project(torch.ones(shape))


def test_padding_fits_any_width() -> None:
    assert NM(2, 4, "pad").refusal((4, 30)) is None
    assert NM(2, 4).refusal((4, 32)) is None
    assert Unstructured(0.5).refusal((1, 1)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_that_are_not_finite(pattern: SparsityPattern, value: float) -> None:
    x = torch.ones(4, 32)
    x[3, 17] = value
    with pytest.raises(PatternError, match="not finite"):
        pattern.project(x)


def test_global_comparison_needs_all_matrices() -> None:
    with pytest.raises(PatternError, match="one matrix alone"):
        Unstructured(0.5, "global").project(torch.ones(4, 4))


# Text


def test_counts_are_decimal() -> None:
    assert pruned_count(0.29, 100) == 29
    assert pruned_count(0.57, 100) == 57
    assert pruned_count(0.5, 7) == 3
    assert pruned_count(0.0, 9) == 0
    assert pruned_count(1e-7, 10_000_000) == 1
    for share, n in itertools.product((i / 100 for i in range(100)), (100, 1000)):
        assert pruned_count(share, n) == round(share * n)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 16:32 ", NM(16, 32)),
        ("4:8 PAD", NM(4, 8, "pad")),
        ("50%", Unstructured(0.5)),
        ("29%", Unstructured(0.29)),
        ("0.5", Unstructured(0.5)),
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0.0)),
        (1e-05, Unstructured(1e-05)),
        ("0.5 row", Unstructured(0.5)),
        ("0.5 matrix", Unstructured(0.5, "matrix")),
        ("12.5% global", Unstructured(0.125, "global")),
        ("block:16x8:0.5", Block(16, 8, 0.5)),
        ("block:1x4:25%", Block(1, 4, 0.25)),
        (NM(1, 2), NM(1, 2)),
    ],
)
def test_parse(text: str | float | SparsityPattern, pattern: SparsityPattern) -> None:
    assert parse_pattern(text) == pattern


@fast
@given(
    st.one_of(
        st.builds(
            Unstructured,
            st.floats(0, 1, exclude_max=True),
            st.sampled_from(["row", "matrix", "global"]),
        ),
        st.sampled_from(RATIOS).map(lambda r: NM(*r)),
        st.sampled_from(RATIOS).map(lambda r: NM(*r, "pad")),
        st.builds(Block, st.integers(1, 64), st.integers(1, 64), st.floats(0, 1, exclude_max=True)),
    )
)
def test_text_is_read_back(pattern: SparsityPattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "", "abc", "nan", "inf", "1.0", "1", "-0.1", "100%", "-5%", "1.2.3", ".", "%", "0.5 rows",
        "1e400", "2:2", "4:2", "0:4", "2:", ":4", "2:4:8", "-1:4", "2:4 padded", "2;4",
        "block:0x4:0.5", "block:4x4", "block:4x4:1.0", "block:4x4:", "block:4:0.5",
        float("nan"), 1.5, -1,
    ],
)  # fmt: skip
def test_what_is_not_a_pattern(text: str | float) -> None:
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize("sparsity", [1.0, -0.01, 2, float("nan"), float("inf")])
def test_shares_outside_the_range(sparsity: float) -> None:
    with pytest.raises(PatternError, match="outside"):
        Unstructured(sparsity)
    with pytest.raises(PatternError, match="outside"):
        Block(2, 2, sparsity)
