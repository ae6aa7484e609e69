"""One weight for many sparsities: levels that say when each weight is pruned, and nested adapters.

A mask at sparsity p is fixed by the importance of the dense weight: of each row the floor(p n) least
important weights are pruned, so masks are nested. The level of a weight is its rank from below, in
256 steps: at a level below the threshold it is pruned, above it is kept, and the few weights on the
threshold itself are told apart by their importance |W| * norm, so that counts are exact.

    unstructured   ranks in each row
    n:M            ranks in each group of M; p = 1 - n / M

Sparsities are cut into groups (0, g_0], (g_0, g_1] and so on, each with a pair of thin matrices. At
sparsity p of group k the weight is

    (W + sum_{i <= k} up_i down_i) * mask_p

Source: Xu et al., "Elastic Post-Training Sparsity", arXiv 2606.25285, section 3.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from zeroskip.ir.errors import PatternError
from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured, least_of_rows, pruned_count
from zeroskip.ir.program import Program
from zeroskip.ir.weights import zero_outside

LEVELS = 256
Hierarchy = Literal["nested", "shared", "independent"]
HIERARCHIES = ("nested", "shared", "independent")


@dataclass(frozen=True, eq=False)
class ElasticLinear:
    """What one linear needs besides its dense weight.

    Args:
        levels: uint8 [out, in]: 0 for what is pruned first.
        norms: float32 [in]: importance is |W| * norms.
        up: float32 [groups, out, rank].
        down: float32 [groups, rank, in].
        serves_lowest: Whether the lowest group uses its adapters; without them it was better if not.
    """

    levels: torch.Tensor
    norms: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    serves_lowest: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape[0], self.levels.shape[1]


@dataclass(frozen=True, eq=False)
class Elastic(Fact):
    """Linears that can be materialised at any sparsity up to the last group's edge.

    Args:
        groups: Upper edges of the groups of sparsities, rising, the last below 1.
        group_of_weights: M of an n:M family; 0 for unstructured rows.
        hierarchy: Which adapters a group uses: those up to its own (`nested`), all (`shared`), or
            its own alone (`independent`).
        linears: By name.
        settings: The pass that trained them and its options, as text.
    """

    groups: tuple[float, ...] = ()
    group_of_weights: int = 0
    hierarchy: Hierarchy = "nested"
    linears: Mapping[str, ElasticLinear] = field(default_factory=dict)
    settings: str = ""

    def group(self, sparsity: float) -> int:
        """Returns the number of the group that a sparsity lies in.

        Raises:
            PatternError: It is beyond what was trained, or not in [0, 1).
        """
        if not 0 <= sparsity <= self.groups[-1]:
            raise PatternError(
                f"sparsity {sparsity:g} is outside [0, {self.groups[-1]:g}], which was trained",
                next_step="choose one within, or train with groups that reach as far",
            )
        return bisect_left(self.groups, sparsity)

    def pattern(self, sparsity: float) -> SparsityPattern:
        """Returns the pattern of masks at a sparsity.

        Raises:
            PatternError: It is not one of the family.
        """
        size = self.group_of_weights
        if not size:
            return Unstructured(sparsity)
        kept = size * (1 - sparsity)
        if abs(kept - round(kept)) > 1e-6 or round(kept) == size:
            shares = ", ".join(f"{1 - n / size:g}" for n in range(size - 1, 0, -1))
            raise PatternError(
                f"no n:{size} pattern prunes {sparsity:g} of the weights",
                next_step=f"choose one of {shares}",
            )
        return NM(round(kept), size)

    def keep(self, name: str, weight: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Returns the mask of a linear, bool [out, in].

        Args:
            name: Of the linear.
            weight: Its dense weight, [out, in].
            sparsity: Share of weights to prune.

        Raises:
            PatternError: No such mask; see `group` and `pattern`.
        """
        self.group(sparsity)
        linear = self.linears[name]
        if sparsity == 0:
            return torch.ones(linear.shape, dtype=torch.bool)
        pattern = self.pattern(sparsity)
        if isinstance(pattern, NM):
            return at_least(linear.levels, (pattern.m - pattern.n) * (LEVELS // pattern.m))
        return _keep_in_rows(linear, weight, sparsity)

    def weight(
        self, name: str, weight: torch.Tensor, sparsity: float, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the weight of a linear at a sparsity, float32 [out, in]; at 0 the dense one itself.

        Args:
            name: Of the linear.
            weight: Its dense weight, [out, in].
            sparsity: Share of weights to prune.
            keep: What `keep` returned for these, if it is known.

        Raises:
            PatternError: No such mask; see `group` and `pattern`.
        """
        if sparsity == 0:
            return weight
        keep = self.keep(name, weight, sparsity) if keep is None else keep
        linear = self.linears[name]
        used = adapters_of(self.group(sparsity), len(self.groups), self.hierarchy)
        if self.group(sparsity) == 0 and not linear.serves_lowest:
            used = range(0)
        return zero_outside(adapted(weight, linear.up, linear.down, used), keep)

    def check(self, program: Program) -> str | None:
        shapes = {linear.name: linear.shape for linear in find_linears(program)}
        edges = (0.0, *self.groups)
        if any(low >= high for low, high in zip(edges, self.groups, strict=False)):
            return f"groups {self.groups} do not rise"
        for name, linear in self.linears.items():
            if name not in shapes:
                return f"{name} is said to be elastic and is not a linear"
            if linear.shape != shapes[name] or linear.levels.dtype != torch.uint8:
                return f"levels of {name} are {linear.levels.dtype} {linear.shape}"
            out, width = linear.shape
            rank = linear.up.shape[-1]
            if tuple(linear.up.shape) != (len(self.groups), out, rank):
                return f"adapters of {name} are {tuple(linear.up.shape)} up"
            if tuple(linear.down.shape) != (len(self.groups), rank, width):
                return f"adapters of {name} are {tuple(linear.down.shape)} down"
        return None

    def restrict(self, linears: Iterable[str]) -> Elastic:
        names = set(linears)
        found = {name: linear for name, linear in self.linears.items() if name in names}
        return replace(self, linears=found)

    def merge(self, other: Elastic) -> Elastic:
        if not self.linears:
            return other
        return replace(other, linears={**self.linears, **other.linears})


def rank_levels(importance: torch.Tensor, group_of_weights: int = 0) -> torch.Tensor:
    """Returns the level of each weight, uint8 [out, in].

    Args:
        importance: [out, in]; of equals the first is pruned first, as patterns do it.
        group_of_weights: M of an n:M family, a power of two up to 256 that divides the width; 0
            ranks whole rows.

    Raises:
        PatternError: M does not fit.
    """
    rows, width = importance.shape
    size = group_of_weights or width
    if group_of_weights and (size < 2 or LEVELS % size or width % size):
        raise PatternError(
            f"groups of {size} weights in rows of {width}",
            next_step="a power of two up to 256 that divides the width, as in 2:4 or 4:8",
        )
    if not importance.numel():
        return torch.zeros(rows, width, dtype=torch.uint8)
    groups = importance.reshape(-1, size)
    order = groups.argsort(dim=1, stable=True)
    from_below = torch.empty_like(order)
    from_below.scatter_(1, order, torch.arange(size).expand_as(order))
    return (from_below * LEVELS // size).to(torch.uint8).view(rows, width)


def at_least(levels: torch.Tensor, threshold: int) -> torch.Tensor:
    """Returns where levels, uint8, reach a threshold; NumPy compares bytes ten times as fast."""
    return torch.from_numpy(np.greater_equal(levels.numpy(), threshold))


def _keep_in_rows(linear: ElasticLinear, weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    width = linear.shape[1]
    pruned = pruned_count(sparsity, width)
    # Level t holds the ranks r with floor(256 r / width) == t.
    threshold = pruned * LEVELS // width
    keep = at_least(linear.levels, threshold)
    more = pruned - math.ceil(threshold * width / LEVELS)
    if more > 0 and keep.numel():  # Without rows there is nothing to cut into rows.
        # As many of each row are on a level: a handful, of which the least important go.
        places = np.flatnonzero(linear.levels.numpy() == threshold)
        on_it = torch.from_numpy(places % width).view(linear.shape[0], -1)
        importance = weight.gather(1, on_it).float().abs() * linear.norms[on_it]
        keep.scatter_(1, on_it, ~least_of_rows(importance, more))
    return keep


def adapters_of(group: int, groups: int, hierarchy: Hierarchy) -> range:
    """Returns which adapters a group uses."""
    if hierarchy == "nested":
        return range(group + 1)
    return range(groups) if hierarchy == "shared" else range(group, group + 1)


def correction(up: torch.Tensor, down: torch.Tensor, used: range) -> torch.Tensor:
    """Returns the sum of up_i down_i, [out, in]; gradients flow.

    Args:
        up: [groups, out, rank].
        down: [groups, rank, in].
        used: Which, one after another; of none the sum is zero.
    """
    ups, downs = _stacked(up, down, used)
    return ups @ downs


def adapted(
    weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, used: range
) -> torch.Tensor:
    """Returns a dense weight and its correction in one product, float32 [out, in]."""
    return torch.addmm(weight.float(), *_stacked(up, down, used))


def _stacked(
    up: torch.Tensor, down: torch.Tensor, used: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapters that are used as one pair of matrices, [out, n rank] and [n rank, in]."""
    chosen = slice(used.start, used.stop)
    return up[chosen].movedim(0, 1).flatten(1), down[chosen].flatten(0, 1)
