"""Swaps of a pruned weight for a kept one within a row, and what they do to the output error.

With d_i what row i has lost, the weights that a mask prunes, the output error is (y' - y)_i = -d_i x:

    e_i = d_i E[x]                                         its mean
    E[(d_i x)^2] = d_i E[x x^T] d_i^T                      its mean square
                 ~ e_i^2 + sum over j of d_ij^2 Var[x_j]   the same if channels are uncorrelated
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.weights import zero_outside

# Rows whose errors are looked at together, and how much of the error a gain must be to be no rounding.
_ROWS = 256
_GAIN = 1e-6


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the inputs of a linear.

    Args:
        mean: E[x], float64 [in].
        variance: Var[x], float64 [in].
        gram: E[x x^T], float32 [in, in], where it is known.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    gram: torch.Tensor | None = None

    def products(self, columns: torch.Tensor) -> torch.Tensor:
        """Returns E[x_a x_b] for each two of the distinct columns of a row: [rows, n] -> [rows, n, n]."""
        if self.gram is not None:
            return self.gram[columns.unsqueeze(2), columns.unsqueeze(1)].double()
        mean = self.mean[columns]
        return mean.unsqueeze(2) * mean.unsqueeze(1) + self.variance[columns].diag_embed()


@dataclass(frozen=True, eq=False)
class Swaps:
    """Swaps of each row, in the order in which they were found; a weight is in one of them at most.

    Args:
        grown: Column that is kept from then on, int64 [rows, cycles].
        pruned: Column that is pruned instead, int64 [rows, cycles].
        made: Whether there was a swap at all, boolean [rows, cycles].
    """

    grown: torch.Tensor
    pruned: torch.Tensor
    made: torch.Tensor

    def apply(self, keep: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mask after the first so many cycles of each row; None: after all of them."""
        done = self.made
        if counts is not None:
            done = done & (torch.arange(done.shape[1]) < counts.unsqueeze(1))
        row, cycle = done.nonzero(as_tuple=True)
        swapped = keep.clone()
        swapped[row, self.grown[row, cycle]] = True
        swapped[row, self.pruned[row, cycle]] = False
        return swapped


def propose_swaps(
    weight: torch.Tensor,
    keep: torch.Tensor,
    moments: Moments,
    group: int | None = None,
    cycles: int = 50,
    tolerance: float = 0.03,
    power: float = 1.0,
) -> Swaps:
    """Finds the swaps of Dynamic Sparse No Training: those that take the mean error e to zero.

    The weight that is grown makes |e| fall, and has the largest |W E[x]| / Var[x]^power of those
    that were pruned. In its place, the least kept weight by |W| sqrt(E[x^2]) is pruned: of those
    whose loss makes |e| fall further; or, with groups, of its group, and then the row ends before e
    would change sign.

    Args:
        weight: Float32 [out, in].
        keep: The mask, boolean [out, in].
        moments: Of the inputs.
        group: How many consecutive weights compete, as the M of N:M; None: the whole row.
        cycles: At most so many swaps for a row.
        tolerance: A row ends when |e| is at most this share of sqrt(sum of d^2 E[x^2]), taken before
            the first swap.
        power: Of the variance.
    """
    count, width = weight.shape
    contribution = weight * moments.mean.float()
    square = moments.variance + moments.mean.square()
    wanda = weight.abs() * square.sqrt().float()
    lost = zero_outside(weight, ~keep).double()
    residual = lost @ moments.mean
    enough = tolerance * (lost.square() @ square).sqrt()
    gain = (contribution / _spread(moments.variance, square).pow(power).float()).nan_to_num_()
    # One queue for each sign of e: [2, out, depth], and how long it is: [2, out].
    depth = min(cycles, width)
    signs = (-1.0, 1.0)
    growable = [~keep & (contribution * sign > 0) for sign in signs]
    grow, grow_length = _queues([-sign * gain for sign in signs], growable, depth)
    open_ones = wanda.masked_fill(~keep, torch.inf)
    if group is None:
        prunable = [keep & (contribution * sign < 0) for sign in signs]
        prune, prune_length = _queues([wanda, wanda], prunable, depth)
    else:
        padded = torch.nn.functional.pad(open_ones, (0, -width % group), value=torch.inf)
        open_ones = padded.view(count, -1, group)

    rows = torch.arange(count)
    taken = torch.zeros(2, count, dtype=torch.int64)
    active = torch.ones(count, dtype=torch.bool)
    began = residual.sign()
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for _ in range(depth):
        active = active & (residual.abs() > enough)
        if not active.any():
            break
        side = (residual > 0).long()
        place = taken[side, rows]
        active = active & (place < grow_length[side, rows])
        grown = grow[side, rows, place.clamp_max(depth - 1)]
        if group is None:
            active = active & (place < prune_length[side, rows])
            pruned = prune[side, rows, place.clamp_max(depth - 1)]
            made = active
        else:
            offers = open_ones[rows, grown // group]
            least, offset = offers.min(1)
            made = active & least.isfinite()
            pruned = torch.where(made, grown - grown % group + offset, grown)
        taken[side, rows] += 1
        change = _mean_effect(weight, moments, pruned) - _mean_effect(weight, moments, grown)
        if group is not None:
            turns = made & ((residual + change).sign() != began)
            active, made = active & ~turns, made & ~turns
            closed = made.nonzero().squeeze(1)
            open_ones[closed, pruned[closed] // group, pruned[closed] % group] = torch.inf
        residual = residual + torch.where(made, change, 0)
        found.append((grown, pruned, made))
    if not found:
        none = torch.zeros(count, 0, dtype=torch.int64)
        return Swaps(none, none, none.bool())
    grown, pruned, made = (torch.stack(column, 1) for column in zip(*found, strict=True))
    return Swaps(grown, pruned, made)


def best_counts(
    swaps: Swaps, weight: torch.Tensor, keep: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """Returns after how many cycles the mean square of each row's error is least, int64 [out].

    It is exact where the Gram matrix is known, else as if channels were uncorrelated. 0 where no
    swap lowers it by more than rounding does.
    """
    counts = torch.zeros(len(weight), dtype=torch.int64)
    if not swaps.made.any():
        return counts
    lost = zero_outside(weight, ~keep)
    if moments.gram is not None:
        slope = (lost @ moments.gram).double()
    else:
        exact = lost.double()
        slope = (exact @ moments.mean).unsqueeze(1) * moments.mean + exact * moments.variance
    error = (lost * slope).sum(1)
    for some in torch.split(swaps.made.any(1).nonzero().squeeze(1), _ROWS):
        columns = torch.stack((swaps.pruned[some], swaps.grown[some]), 2).flatten(1)
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
        amount = swaps.made[some].unsqueeze(2) * sign
        amount = amount.flatten(1) * weight[some].gather(1, columns)
        products = moments.products(columns)
        # Each change d <- d + a adds 2 a (d G)_j + a^2 G_jj, where d has the changes before it.
        earlier = (products.tril(-1) @ amount.unsqueeze(2)).squeeze(2)
        at_start = slope[some].gather(1, columns)
        own = products.diagonal(dim1=1, dim2=2)
        steps = amount * (2 * (at_start + earlier) + amount * own)
        change = steps.cumsum(1)[:, 1::2]
        least, cycle = change.min(1)
        counts[some] = torch.where(least < -_GAIN * error[some], cycle + 1, 0)
    return counts


def _spread(variance: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The variance in units of the mean square, or what rounding leaves of a channel that is constant."""
    return torch.maximum(variance, 1e-12 * square) / square.mean()


def _queues(
    keys: list[torch.Tensor], allowed: list[torch.Tensor], depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of least key among those allowed, ties by position, and how many are allowed."""
    ordered = [
        key.masked_fill(~fits, torch.inf).sort(dim=1, stable=True).indices[:, :depth]
        for key, fits in zip(keys, allowed, strict=True)
    ]
    return torch.stack(ordered), torch.stack([fits.sum(1) for fits in allowed])


def _mean_effect(weight: torch.Tensor, moments: Moments, columns: torch.Tensor) -> torch.Tensor:
    chosen = weight.gather(1, columns.unsqueeze(1)).squeeze(1)
    return chosen.double() * moments.mean[columns]
