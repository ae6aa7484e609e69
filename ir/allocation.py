"""How many weights each linear gives, so that all together give an exact number of them.

A linear is pruned in steps. Compared within rows, one step prunes one more weight of every row, so
it is as many weights as there are rows; compared within the matrix, it is one weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# Linears with steps of one size that may be moved to hit the total exactly: far more than needed.
_MOVED = 32


@dataclass(frozen=True)
class Share:
    """What one linear may give.

    Args:
        step: Weights pruned in one step.
        steps: Steps that would prune all of it.
        low: Fewest steps.
        high: Most steps.
    """

    step: int
    steps: int
    low: int
    high: int

    @property
    def weights(self) -> int:
        return self.step * self.steps


def level_shares(offsets: Sequence[float], shares: Sequence[Share], total: int) -> list[float]:
    """Shifts what each linear wants by one constant, until all of them give the total.

    Args:
        offsets: Share of its weights that each linear would like to give, up to the constant.
        shares: What each may give; where the bounds cut in, the others make up for it.
        total: Weights to give, between the sums of the bounds.

    Returns:
        Steps of each linear, not yet whole numbers.
    """
    wanted = torch.tensor(list(offsets), dtype=torch.float64)
    step, steps, low, high = _columns(shares)

    def given(shift: float) -> torch.Tensor:
        return torch.minimum(torch.maximum((wanted + shift) * steps, low), high)

    least, most = -1 - float(wanted.max()), 1 - float(wanted.min())
    for _ in range(100):  # Halving a float64 interval so often leaves nothing of it.
        middle = (least + most) / 2
        if float((given(middle) * step).sum()) < total:
            least = middle
        else:
            most = middle
    return [float(x) for x in given(most)]


def cheapest_shares(
    errors: Sequence[Sequence[float]], shares: Sequence[Share], total: int
) -> list[float]:
    """Chooses what each linear gives so that the sum of their errors is least.

    The error of a linear is made convex (its lower hull) and cut into pieces, each with a price:
    the error that pruning one more weight adds. The cheapest pieces are taken first, over all
    linears, which for convex errors is the optimum. Of equal prices, the earlier linear gives first.

    Args:
        errors: For each linear, its error at equally spaced sparsities from 0 to 1.
        shares: What each may give.
        total: Weights to give, between the sums of the bounds.

    Returns:
        Steps of each linear, not yet whole numbers.
    """
    owners, prices, sizes = [], [], []
    for index, (curve, share) in enumerate(zip(errors, shares, strict=True)):
        for left, right, rise in _pieces(curve, share):
            owners.append(index)
            prices.append(rise / share.step)
            sizes.append((right - left) * share.step)
    given = [float(share.low) for share in shares]
    left_over = float(total - sum(share.low * share.step for share in shares))
    for piece in torch.tensor(prices, dtype=torch.float64).argsort(stable=True).tolist():
        taken = min(sizes[piece], left_over)
        if taken <= 0:
            break
        given[owners[piece]] += taken / shares[owners[piece]].step
        left_over -= taken
    return given


def _pieces(curve: Sequence[float], share: Share) -> list[tuple[float, float, float]]:
    """Cuts a convex hull into (first step, last step, error added by one step) within the bounds."""
    spacing = share.steps / (len(curve) - 1)
    hull: list[tuple[float, float]] = []
    for k, error in enumerate(curve):
        x, y = k * spacing, float(error)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    found = []
    for (x0, y0), (x1, y1) in pairwise(hull):
        left, right = max(x0, share.low), min(x1, share.high)
        if left < right:
            found.append((left, right, _slope((x0, y0), (x1, y1))))
    return found


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def whole_steps(wanted: Sequence[float], shares: Sequence[Share], total: int) -> list[int]:
    """Rounds steps to whole numbers that give as nearly the total as rounding allows.

    Down first; then those with the largest remainders get one more while it fits; then, where the
    sizes of steps differ, some linears move by one step more or less to close what is left.

    Args:
        wanted: Steps of each linear; together they give about the total.
        shares: What each may give; the bounds hold.
        total: Weights to give.
    """
    found = [min(max(math.floor(w), s.low), s.high) for w, s in zip(wanted, shares, strict=True)]
    missing = total - sum(k * s.step for k, s in zip(found, shares, strict=True))
    order = sorted(range(len(found)), key=lambda i: (found[i] - wanted[i], i))
    moved = True
    while moved and missing > 0:
        moved = False
        for i in order:
            if found[i] < shares[i].high and shares[i].step <= missing:
                found[i], missing, moved = found[i] + 1, missing - shares[i].step, True
    moved = True
    while moved and missing < 0:
        moved = False
        for i in reversed(order):
            if missing < 0 and found[i] > shares[i].low:
                found[i], missing, moved = found[i] - 1, missing + shares[i].step, True
    if missing == 0:
        return found
    up: dict[int, list[int]] = {}
    down: dict[int, list[int]] = {}
    for i in sorted(range(len(found)), key=lambda i: (found[i] - wanted[i], i)):
        if found[i] < shares[i].high:
            up.setdefault(shares[i].step, []).append(i)
        if found[i] > shares[i].low:
            down.setdefault(shares[i].step, []).insert(0, i)
    sizes = sorted({*up, *down})
    rooms = [(len(down.get(s, [])), len(up.get(s, []))) for s in sizes]
    for size, moves in zip(sizes, fewest_moves(missing, sizes, rooms), strict=True):
        for i in up[size][:moves] if moves > 0 else down.get(size, [])[:-moves]:
            found[i] += 1 if moves > 0 else -1
    return found


def fewest_moves(missing: int, sizes: Sequence[int], rooms: Sequence[tuple[int, int]]) -> list[int]:
    """Returns how many steps of each size come closest to a sum, with the fewest steps in all.

    Args:
        missing: The sum; of two sums that are equally close, the smaller is taken.
        sizes: Of steps, positive and different.
        rooms: How many steps of a size may be taken back, and how many added.
    """
    unit = math.gcd(*sizes)
    reach = _MOVED * max(sizes) // unit  # Sums beyond it need not be looked at.
    never = torch.iinfo(torch.int32).max // 2
    costs = torch.full((2 * reach + 1,), never, dtype=torch.int32)
    costs[reach] = 0
    choices = []
    for size, (back, forth) in zip(sizes, rooms, strict=True):
        best, choice = costs.clone(), torch.zeros_like(costs)
        for moves in range(-min(back, _MOVED), min(forth, _MOVED) + 1):
            shift = moves * size // unit
            if moves == 0:
                continue
            moved = torch.full_like(costs, never)
            if shift > 0:
                moved[shift:] = costs[:-shift]
            else:
                moved[:shift] = costs[-shift:]
            moved += abs(moves)
            better = moved < best
            best = torch.where(better, moved, best)
            choice = torch.where(better, moves, choice)
        costs = best.clamp_max(never)
        choices.append(choice)
    sums = (costs < never).nonzero().flatten() - reach
    place = int(sums[((sums * unit - missing).abs() * 2 + (sums * unit > missing)).argmin()])
    found: list[int] = []
    for size, choice in zip(reversed(sizes), reversed(choices), strict=True):
        moves = int(choice[place + reach])
        found.insert(0, moves)
        place -= moves * size // unit
    return found


def _columns(shares: Sequence[Share]) -> tuple[torch.Tensor, ...]:
    rows = [(s.step, s.steps, s.low, s.high) for s in shares]
    return torch.tensor(rows, dtype=torch.float64).T.unbind(0)
