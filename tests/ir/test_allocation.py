"""Allocation: the least sum of errors, and totals that are exact to what rounding allows."""

from __future__ import annotations

import itertools
import random

import pytest

from zeroskip.ir.allocation import (
    Share,
    cheapest_shares,
    fewest_moves,
    level_shares,
    whole_steps,
)


def given(steps: list[int] | list[float], shares: list[Share]) -> float:
    return sum(k * s.step for k, s in zip(steps, shares, strict=True))


def some_shares(generator: random.Random, count: int) -> list[Share]:
    found = []
    for _ in range(count):
        steps = generator.randint(1, 40)
        low = generator.randint(0, steps // 3)
        found.append(Share(generator.choice([6, 10, 15, 16, 24]), steps, low, steps - 1))
    return [s for s in found if s.low <= s.high] or [Share(6, 9, 0, 8)]


@pytest.mark.parametrize("seed", range(40))
def test_totals_are_as_near_as_rounding_allows(seed: int) -> None:
    generator = random.Random(seed)
    shares = some_shares(generator, 6)
    wanted = [generator.uniform(s.low, s.high) for s in shares]
    total = round(given(wanted, shares))
    found = whole_steps(wanted, shares, total)
    assert all(s.low <= k <= s.high for k, s in zip(found, shares, strict=True))
    # Every rounding up or down of what is wanted, by brute force.
    choices = [
        range(max(int(w), s.low), min(int(w) + 1, s.high) + 1)
        for w, s in zip(wanted, shares, strict=True)
    ]
    nearest = min(abs(given(list(c), shares) - total) for c in itertools.product(*choices))
    assert abs(given(found, shares) - total) <= nearest
    assert all(abs(k - w) <= 3 for k, w in zip(found, wanted, strict=True))


def test_one_size_of_steps_leaves_less_than_half_a_step() -> None:
    shares = [Share(7, 10, 0, 9)] * 4
    for total in range(150):
        found = whole_steps([total / 28] * 4, shares, total)
        assert abs(given(found, shares) - total) <= 3
        assert max(found) - min(found) <= 1
        assert found == sorted(found, reverse=True)  # Ties: the earlier give first.


@pytest.mark.parametrize(
    ("missing", "sizes", "rooms", "moves"),
    [
        (3, [5, 8], [(3, 3), (3, 3)], [-1, 1]),
        (1, [3, 5], [(3, 3), (3, 3)], [2, -1]),
        (1, [3, 5], [(2, 1), (1, 1)], [0, 0]),  # 0 and 5 - 3 are as near: the smaller.
        (2, [3, 5], [(1, 1), (0, 3)], [-1, 1]),
        (2, [3], [(4, 4)], [1]),
        (1, [2], [(4, 4)], [0]),
        (4, [3, 7], [(0, 0), (0, 0)], [0, 0]),
        (-4, [4, 9], [(2, 2), (2, 2)], [-1, 0]),
    ],
)
def test_fewest_moves(
    missing: int, sizes: list[int], rooms: list[tuple[int, int]], moves: list[int]
) -> None:
    assert fewest_moves(missing, sizes, rooms) == moves


@pytest.mark.parametrize("seed", range(10))
def test_the_sum_of_errors_is_the_least(seed: int) -> None:
    """Against dynamic programming over every whole number of pieces."""
    generator = random.Random(seed)
    points = 8
    shares = [Share(generator.choice([2, 3, 4]), points, 0, points) for _ in range(5)]
    curves = []
    for _ in shares:
        rises = sorted(generator.random() for _ in range(points))
        curves.append([sum(rises[:k]) for k in range(points + 1)])
    best: dict[int, float] = {0: 0.0}
    for curve, share in zip(curves, shares, strict=True):
        following: dict[int, float] = {}
        for weights, error in best.items():
            for k, rise in enumerate(curve):
                key = weights + k * share.step
                following[key] = min(following.get(key, 1e9), error + rise)
        best = following

    def error(steps: list[float]) -> float:
        found = 0.0
        for k, curve in zip(steps, curves, strict=True):
            low = min(int(k), points - 1)
            found += curve[low] + (curve[low + 1] - curve[low]) * (k - low)
        return found

    for total in range(0, sum(s.weights for s in shares), 7):
        steps = cheapest_shares(curves, shares, total)
        assert given(steps, shares) == pytest.approx(total)
        # Parts of a piece may be taken, so it may be better, and is never worse.
        assert error(steps) <= best.get(total, 1e9) + 1e-9
        whole = sum(abs(k - round(k)) > 1e-9 for k in steps)
        assert whole <= 1


def test_a_dent_is_passed_over() -> None:
    # Pruning half of the first costs much, all of it little more: its hull is straight.
    shares = [Share(1, 10, 0, 10), Share(1, 10, 0, 10)]
    steps = cheapest_shares([[0, 0.9, 1.0], [0, 0.4, 2.0]], shares, 10)
    assert steps == [5, 5]
    assert cheapest_shares([[0, 0.9, 1.0], [0, 0.6, 2.0]], shares, 10) == [10, 0]


def test_bounds_hold_and_the_others_make_up() -> None:
    shares = [Share(2, 10, 3, 4), Share(3, 10, 0, 10)]
    curves = [[0.0, 0.1, 0.3], [0.0, 5.0, 20.0]]
    assert cheapest_shares(curves, shares, 20) == [4, 4]
    assert cheapest_shares([curves[1], curves[0]], shares, 21) == [3, 5]
    level = level_shares([0.5, 0.0], shares, 20)
    assert level == pytest.approx([4, 4])
    assert level_shares([0.0, 0.9], shares, 21) == pytest.approx([3, 5])


def test_equal_linears_are_taken_in_order() -> None:
    shares = [Share(2, 4, 0, 4)] * 3
    assert cheapest_shares([[0.0, 1.0]] * 3, shares, 12) == [4, 2, 0]


def test_more_to_give_takes_from_none() -> None:
    generator = random.Random(7)
    shares = some_shares(generator, 12)
    curves = [[(k / 20) ** generator.uniform(1, 4) for k in range(21)] for _ in shares]
    offsets = [generator.uniform(-0.1, 0.1) for _ in shares]
    least, most = (sum(s.step * getattr(s, b) for s in shares) for b in ("low", "high"))
    before: list[list[float]] = [[0.0] * len(shares)] * 2
    for total in range(least, most, 37):
        now = [cheapest_shares(curves, shares, total), level_shares(offsets, shares, total)]
        for old, new in zip(before, now, strict=True):
            assert all(a <= b + 1e-6 for a, b in zip(old, new, strict=True))
            assert given(new, shares) == pytest.approx(total, abs=1e-5)
        before = now
