"""Orders of channels: assignment against brute force, and never less kept than before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from zeroskip.ir.assignment import cheapest_assignment
from zeroskip.ir.channel_order import best_order, dealt_out, retained_score
from zeroskip.ir.patterns import NM


def bins_of(width: int, m: int = 4) -> list[Tensor]:
    return list(torch.arange(width).split(m))


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    """Scores with channels of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    return scores * torch.rand(columns, generator=generator).square() * 8


@pytest.mark.parametrize("seed", range(40))
def test_assignments_are_the_cheapest_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 1 + seed % 6
    cost = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        cost = cost.round()  # Many ties.
    if seed % 3 == 1:
        cost = cost[:, :1] * cost[:1]  # Every row is like the others.
    found = cheapest_assignment(cost)
    assert sorted(found.tolist()) == list(range(n))
    least = min(
        sum(float(cost[i, j]) for i, j in enumerate(columns))
        for columns in itertools.permutations(range(n))
    )
    assert float(cost[torch.arange(n), found].sum()) == pytest.approx(least, abs=1e-9)


def test_a_larger_assignment_has_prices_that_prove_it() -> None:
    """No exchange along a cycle of two or three rows is cheaper, and nothing is given out twice."""
    cost = torch.rand(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cheapest_assignment(cost)
    assert sorted(found.tolist()) == list(range(40))
    chosen = cost[:, found]  # Entry (i, k): row i at the column of row k.
    saved = chosen.diag()[:, None] - chosen
    assert float((saved + saved.T).max()) <= 1e-12
    three = saved[:, :, None] + saved[None] + saved.T[:, None]
    assert float(three.max()) <= 1e-12


def all_partitions(width: int, m: int) -> list[Tensor]:
    """One order for each way to put channels into groups of m."""
    if width == m:
        return [torch.arange(m)]
    found = []

    def extend(order: list[int], left: list[int]) -> None:
        if not left:
            found.append(torch.tensor(order))
            return
        for rest in itertools.combinations(left[1:], m - 1):
            group = [left[0], *rest]
            extend(order + group, [c for c in left if c not in group])

    extend([], list(range(width)))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_against_every_order_of_eight_channels(seed: int) -> None:
    scores, bins = drawn(5, 8, seed), bins_of(8)
    best = max(retained_score(scores, order, bins, 2) for order in all_partitions(8, 4))
    found = retained_score(scores, best_order(scores, bins, 2, sweeps=8), bins, 2)
    now = retained_score(scores, torch.arange(8), bins, 2)
    assert now <= found <= best * (1 + 1e-9)
    # Most of what can be gained is gained; the search is no exact one.
    assert found - now >= 0.6 * (best - now)


def test_groups_of_two_are_paired_best_of_all() -> None:
    """Where a single assignment decides, it is the best: one channel of each pair is moved."""
    scores, bins = drawn(6, 8, 3), bins_of(8, 2)
    found = best_order(scores, bins, 1, sweeps=1)
    kept = retained_score(scores, found, bins, 1)
    second = found[1::2]
    for rest in itertools.permutations(second.tolist()):
        other = found.clone()
        other[1::2] = torch.tensor(rest)
        assert retained_score(scores, other, bins, 1) <= kept * (1 + 1e-7)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(2, 4, "pad")])
@pytest.mark.parametrize("seed", range(3))
def test_more_is_kept_than_before(pattern: NM, seed: int) -> None:
    width = 30 if pattern.remainder == "pad" else 32
    scores, bins = drawn(12, width, seed), bins_of(width, pattern.m)
    order = best_order(scores, bins, pattern.n)
    assert sorted(order.tolist()) == list(range(width))
    before, after = (
        float(each.masked_fill(~pattern.project(each), 0).sum())
        for each in (scores, scores[:, order])
    )
    assert after > before
    assert retained_score(scores, order, bins, pattern.n) == pytest.approx(after, rel=1e-5)
    # A sweep adds to what dealing out gives, and another takes nothing away.
    dealt = retained_score(scores, dealt_out(scores, bins), bins, pattern.n)
    more = retained_score(scores, best_order(scores, bins, pattern.n, 3), bins, pattern.n)
    assert dealt < after * (1 + 1e-6)
    assert more >= after * (1 - 1e-6)


def test_channels_are_dealt_to_and_fro() -> None:
    scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    found = dealt_out(scores, bins_of(8))
    assert sorted(found[:4].tolist()) == [0, 3, 4, 7]
    assert sorted(found[4:].tolist()) == [1, 2, 5, 6]


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(3, 8), torch.ones(3, 8), torch.rand(3, 4), torch.tensor([[9.0, 9, 1, 1] * 2])],
    ids=["dead", "ties", "one group", "nothing to gain"],
)
def test_an_order_that_keeps_no_more_is_not_taken(scores: Tensor) -> None:
    order = best_order(scores, bins_of(scores.shape[1]), 2)
    assert torch.equal(order, torch.arange(scores.shape[1]))


def test_the_crowded_group_is_broken_up() -> None:
    # Four large channels side by side, of which 2:4 keeps two.
    scores = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]]).expand(3, 8)
    order = best_order(scores, bins_of(8), 2)
    assert retained_score(scores, order, bins_of(8), 2) == 3 * 36


def test_one_row_or_no_sweep() -> None:
    scores, bins = drawn(1, 16, 5), bins_of(16)
    for sweeps in (0, 1, 2):
        order = best_order(scores, bins, 2, sweeps)
        assert sorted(order.tolist()) == list(range(16))
