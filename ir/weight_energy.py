"""The energy of rows and columns of a weight: what pruning takes of it, and giving it back.

The energy of a vector is sum (w - mean)^2, with the mean of the vector before pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from zeroskip.ir.facts import Fact, Mask
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.weights import zero_outside

Correction = Literal["none", "column", "row", "both"]


@dataclass(frozen=True, eq=False)
class Compensation:
    """What was done to one linear.

    Args:
        mask: The mask whose losses were made up for.
        mode: Along what.
        smallest: The smallest scale; 1 when there was none.
        largest: The largest scale.
    """

    mask: Mask
    mode: Correction
    smallest: float
    largest: float


@dataclass(frozen=True, eq=False)
class Compensated(Fact):
    """Which pruned linears were given their energy back, and why just so.

    Args:
        linears: By linear.
        losses: What each choice costs on the outputs of the program, by mode; empty when nobody asked.
        batches: Number of calibration batches that it was judged on.
    """

    linears: Mapping[str, Compensation] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    batches: int = 0

    def check(self, program: Program) -> str | None:
        shapes = {linear.name: linear.shape for linear in find_linears(program)}
        for name, found in self.linears.items():
            if shapes.get(name) != found.mask.shape:
                return f"{name} is said to be compensated under a mask of {found.mask.shape}"
            if not 0 < found.smallest <= found.largest < math.inf:
                return f"the scales of {name} go from {found.smallest} to {found.largest}"
        return None

    def restrict(self, linears: Iterable[str]) -> Compensated:
        names = set(linears)
        kept = {n: c for n, c in self.linears.items() if n in names}
        return Compensated(kept, self.losses, self.batches)

    def merge(self, other: Compensated) -> Compensated:
        judged = other if other.losses else self
        return Compensated({**self.linears, **other.linears}, judged.losses, judged.batches)


def restore_energy(
    weight: torch.Tensor, keep: torch.Tensor, mode: Correction, clamp: tuple[float, float]
) -> tuple[torch.Tensor, float, float]:
    """Returns the kept weights with the energy of the columns, then of the rows, brought back.

    Every vector of W * M is scaled about its old mean, and the mask is put on it again: so the
    energy is the old one before that, and close to it after.

    Args:
        weight: [out, in], float32 or float64, before pruning.
        keep: Boolean [out, in].
        mode: Along what.
        clamp: Least and largest scale.

    Returns:
        The new weight, zero outside the mask, the smallest and the largest scale.
    """
    pruned = zero_outside(weight, keep)
    used: list[torch.Tensor] = []
    if mode in ("column", "both"):
        pruned = _restore(pruned, weight, keep, 0, clamp, used)
    if mode in ("row", "both"):
        pruned = _restore(pruned, weight, keep, 1, clamp, used)
    scales = torch.cat(used) if used else torch.ones(0)
    if scales.numel() == 0:
        return pruned, 1.0, 1.0
    return pruned, float(scales.min()), float(scales.max())


def _restore(
    pruned: torch.Tensor,
    weight: torch.Tensor,
    keep: torch.Tensor,
    dim: int,
    clamp: tuple[float, float],
    used: list[torch.Tensor],
) -> torch.Tensor:
    """Scales the columns (dim 0) or the rows (dim 1); those that keep nothing are left out."""
    mean = weight.mean(dim, keepdim=True, dtype=torch.float64).to(weight.dtype)
    wanted = (weight - mean).square().sum(dim, keepdim=True, dtype=torch.float64)
    centred = pruned - mean
    left = centred.square().sum(dim, keepdim=True, dtype=torch.float64)
    # Without energy left there is nothing to scale: the vector is its mean.
    scale = torch.where(left > 0, wanted / left, 1.0).sqrt().clamp(*clamp)
    live = keep.any(dim, keepdim=True)
    used.append(scale[live])
    scale = torch.where(live, scale, 1.0).to(weight.dtype)
    return zero_outside(centred.mul_(scale).add_(mean), keep)
