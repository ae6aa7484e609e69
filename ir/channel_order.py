"""In which order input channels lose least under N:M: heuristic allocation, then assignment.

Channels are put into bins, each of which is one group of N:M in every row. Which slot of its bin a
channel takes makes no difference. Zhang et al., "Plug-and-Play", ICLR 2024, section 4: channels are
dealt out by their summed scores, then one channel of every bin at a time is assigned anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroskip.ir.assignment import cheapest_assignment

# An order that keeps this much more, relatively, is better, and not merely summed up otherwise.
_BETTER = 1e-6

Bins = Sequence[torch.Tensor]


def retained_score(scores: torch.Tensor, order: torch.Tensor, bins: Bins, keep: int) -> float:
    """Returns what is kept of the scores when slot j holds channel `order[j]`.

    Args:
        scores: [rows, channels], none negative.
        order: int64 [channels].
        bins: The slots of each bin.
        keep: How many of a bin are kept in each row.
    """
    total = 0.0
    for slots in bins:
        inside = scores[:, order[slots]]
        kept = inside.topk(min(keep, len(slots)), 1).values
        total += float(kept.sum(dtype=torch.float64))
    return total


def best_order(scores: torch.Tensor, bins: Bins, keep: int, sweeps: int = 1) -> torch.Tensor:
    """Returns an order of the channels that keeps at least as much as the one they are in.

    Args:
        scores: [rows, channels], none negative.
        bins: The slots of each bin; every slot is in one.
        keep: How many of a bin are kept in each row.
        sweeps: How often each channel is assigned anew, at most.

    Returns:
        int64 [channels]: the channel in each slot. The order they are in where none is better.
    """
    as_they_are = torch.arange(scores.shape[1])
    least = retained_score(scores, as_they_are, bins, keep) * (1 + _BETTER)
    if len(bins) < 2:
        return as_they_are
    for start in (dealt_out(scores, bins), as_they_are):
        order = _assigned(scores, start, bins, keep, sweeps)
        if retained_score(scores, order, bins, keep) > least:
            return _tidy(order, bins)
    return as_they_are


def dealt_out(scores: torch.Tensor, bins: Bins) -> torch.Tensor:
    """Deals the channels out by falling sum of scores: to the first bin up to the last, and back."""
    ranked = scores.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).tolist()
    order = torch.empty(len(ranked), dtype=torch.long)
    dealt = 0
    for turn in range(max(len(slots) for slots in bins)):
        open_bins = [slots for slots in bins if len(slots) > turn]
        for slots in open_bins if turn % 2 == 0 else open_bins[::-1]:
            order[slots[turn]] = ranked[dealt]
            dealt += 1
    return order


def _assigned(
    scores: torch.Tensor, order: torch.Tensor, bins: Bins, keep: int, sweeps: int
) -> torch.Tensor:
    """Takes one channel out of every bin at a time and puts each where it adds most."""
    order = order.clone()
    for _ in range(sweeps):
        before = retained_score(scores, order, bins, keep)
        for turn in range(max(len(slots) for slots in bins)):
            open_bins = [slots for slots in bins if len(slots) > turn]
            taken = torch.stack([slots[turn] for slots in open_bins])
            gains = _gains(scores, order, open_bins, turn, keep)
            order[taken[cheapest_assignment(-gains)]] = order[taken].clone()
        if retained_score(scores, order, bins, keep) <= before * (1 + _BETTER):
            break
    return order


def _gains(
    scores: torch.Tensor, order: torch.Tensor, bins: Bins, turn: int, keep: int
) -> torch.Tensor:
    """What each channel at one turn would add to each bin without its own, float64 [bins, bins].

    Of the rest of a bin a row keeps the `keep` largest; one more channel takes the place of the
    least of them where it is larger.
    """
    moving = scores[:, order[torch.stack([slots[turn] for slots in bins])]]
    gains = torch.empty(len(bins), len(bins), dtype=torch.float64)
    for number, slots in enumerate(bins):
        rest = scores[:, order[torch.cat([slots[:turn], slots[turn + 1 :]])]]
        added = moving
        if rest.shape[1] >= keep:
            least = rest.topk(keep, 1).values[:, -1:]
            added = (moving - least).clamp_(min=0)
        gains[:, number] = added.sum(0, dtype=torch.float64)
    return gains


def _tidy(order: torch.Tensor, bins: Bins) -> torch.Tensor:
    """The same bins, with the channels of each in the order they were in."""
    tidy = order.clone()
    for slots in bins:
        tidy[slots] = order[slots].sort().values
    return tidy
