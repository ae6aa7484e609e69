"""Levels and adapters: exact counts at any sparsity, nesting, and agreement with projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.ir.elastic import Elastic, ElasticLinear, adapters_of, correction, rank_levels
from zeroskip.ir.errors import PatternError
from zeroskip.ir.patterns import NM, Unstructured, pruned_count

GROUPS = (0.4, 0.55, 0.7)


def make(
    rows: int,
    width: int,
    *,
    size: int = 0,
    groups: tuple[float, ...] = GROUPS,
    seed: int = 0,
    **options: Any,
) -> tuple[Elastic, torch.Tensor]:
    """An elastic linear `fc` with random adapters, and its dense weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    norms = torch.rand(width, generator=generator) + 0.1
    up = torch.randn(len(groups), rows, 2, generator=generator) * 0.1
    down = torch.randn(len(groups), 2, width, generator=generator) * 0.1
    levels = rank_levels(weight.abs() * norms, size)
    linear = ElasticLinear(levels, norms, up, down, **options)
    return Elastic(groups, size, "nested", {"fc": linear}), weight


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 700),
    st.floats(0, 0.7),
    st.floats(0, 0.7),
)
def test_rows_are_what_a_projection_keeps_at_any_sparsity(
    rows: int, width: int, first: float, second: float
) -> None:
    elastic, weight = make(rows, width, seed=width)
    importance = weight.abs() * elastic.linears["fc"].norms
    low, high = sorted((first, second))
    keeps = [elastic.keep("fc", weight, sparsity) for sparsity in (low, high)]
    for keep, sparsity in zip(keeps, (low, high), strict=True):
        assert torch.equal(keep, Unstructured(sparsity).project(importance))
        assert (keep.sum(1) == width - pruned_count(sparsity, width)).all()
    assert not (keeps[1] & ~keeps[0]).any(), (
        "what is kept at the higher sparsity is kept at the lower"
    )


def test_ties_are_broken_as_a_projection_breaks_them() -> None:
    weight = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, 0.0, 2.0]).repeat(3, 100)
    norms = torch.ones(700)
    linear = ElasticLinear(
        rank_levels(weight.abs()), norms, torch.zeros(3, 3, 1), torch.zeros(3, 1, 700)
    )
    elastic = Elastic(GROUPS, 0, "nested", {"fc": linear})
    for sparsity in (0.1, 0.3, 0.301, 0.43, 0.5, 0.699):
        keep = elastic.keep("fc", weight, sparsity)
        assert torch.equal(keep, Unstructured(sparsity).project(weight.abs())), sparsity


@pytest.mark.parametrize(("n", "m"), [(4, 8), (3, 8), (2, 8), (2, 4), (1, 4), (8, 16)])
def test_groups_of_weights(n: int, m: int) -> None:
    elastic, weight = make(6, 64, size=m, groups=(0.5, 0.75))
    importance = weight.abs() * elastic.linears["fc"].norms
    keep = elastic.keep("fc", weight, 1 - n / m)
    assert torch.equal(keep, NM(n, m).project(importance))


def test_weights_at_a_sparsity() -> None:
    elastic, weight = make(6, 50)
    linear = elastic.linears["fc"]
    for sparsity, used in ((0.2, 1), (0.4, 1), (0.41, 2), (0.55, 2), (0.7, 3)):
        keep = elastic.keep("fc", weight, sparsity)
        added = sum(linear.up[i] @ linear.down[i] for i in range(used))
        expected = (weight + added) * keep
        torch.testing.assert_close(elastic.weight("fc", weight, sparsity), expected)


def test_sparsity_zero_is_the_dense_weight_itself() -> None:
    elastic, weight = make(6, 50)
    assert elastic.weight("fc", weight, 0.0) is weight


def test_the_lowest_group_can_do_without() -> None:
    elastic, weight = make(6, 50, serves_lowest=False)
    keep = elastic.keep("fc", weight, 0.3)
    assert torch.equal(elastic.weight("fc", weight, 0.3), weight * keep)
    assert not torch.equal(
        elastic.weight("fc", weight, 0.5), weight * elastic.keep("fc", weight, 0.5)
    )


@pytest.mark.parametrize("sparsity", [0.71, 0.9, 1.0, -0.1])
def test_sparsities_beyond_what_was_trained_are_refused(sparsity: float) -> None:
    elastic, weight = make(6, 50)
    with pytest.raises(PatternError, match=r"(?s)outside \[0, 0.7\], which was trained.*groups"):
        elastic.weight("fc", weight, sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.45, 0.6])
def test_sparsities_of_no_pattern_are_refused(sparsity: float) -> None:
    elastic, weight = make(6, 64, size=8, groups=(0.5, 0.75))
    with pytest.raises(PatternError, match=r"(?s)no n:8 pattern.*0.125, 0.25, 0.375, 0.5"):
        elastic.weight("fc", weight, sparsity)


@pytest.mark.parametrize(("width", "size"), [(12, 8), (64, 3), (64, 512)])
def test_groups_that_do_not_fit_are_refused(width: int, size: int) -> None:
    with pytest.raises(PatternError, match="power of two"):
        rank_levels(torch.rand(2, width), size)


def test_which_adapters_serve() -> None:
    assert list(adapters_of(1, 3, "nested")) == [0, 1]
    assert list(adapters_of(1, 3, "shared")) == [0, 1, 2]
    assert list(adapters_of(1, 3, "independent")) == [1]
    up, down = torch.randn(3, 5, 2), torch.randn(3, 2, 4)
    torch.testing.assert_close(correction(up, down, range(1, 3)), up[1] @ down[1] + up[2] @ down[2])
    assert not correction(up, down, range(0)).any()
