"""Sparsity patterns: which sets of weights may be kept, and the best such set for given scores.

Every pattern keeps an exact number of weights. Ties go by position: of two equal scores the one
that comes first (lower column, then lower row) is pruned, as a stable ascending sort would do.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from zeroskip.ir.errors import PatternError
from zeroskip.ir.weights import all_finite

Comparison = Literal["row", "matrix", "global"]
Remainder = Literal["refuse", "pad"]


@dataclass(frozen=True)
class SparsityPattern(ABC):
    """A family of masks over an [out, in] weight."""

    @abstractmethod
    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Returns why no weight of this shape can follow the pattern, or None when it can."""

    @abstractmethod
    def project(self, scores: torch.Tensor) -> torch.Tensor:
        """Chooses what to keep.

        Args:
            scores: [out, in], finite; higher is more important.

        Returns:
            Boolean [out, in]; True keeps the weight.

        Raises:
            PatternError: The shape does not fit, or a score is not finite.
        """

    @abstractmethod
    def violation(self, keep: torch.Tensor) -> str | None:
        """Returns where a boolean [out, in] mask keeps more than the pattern allows, or None."""

    def _check(self, scores: torch.Tensor) -> None:
        reason = self.refusal((scores.shape[0], scores.shape[1]))
        if reason is not None:
            raise PatternError(f"{self} does not fit: {reason}")
        if not all_finite(scores):
            raise PatternError(
                "the scores are not finite", next_step="look for NaN or inf in the weight"
            )


@dataclass(frozen=True)
class Unstructured(SparsityPattern):
    """Prunes floor(sparsity * n) weights of each row, of each matrix, or of all matrices together.

    Args:
        sparsity: Share of weights to prune, in [0, 1).
        comparison: What competes with what: `row` (each output on its own), `matrix`, or `global`
            (all matrices; the pass that chooses such masks counts them, one mask has no bound).
    """

    sparsity: float
    comparison: Comparison = "row"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"{self.sparsity}" + ("" if self.comparison == "row" else f" {self.comparison}")

    def refusal(self, shape: tuple[int, int]) -> str | None:
        return None

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        self._check(scores)
        if self.comparison == "global":
            raise PatternError(f"{self} cannot be decided for one matrix alone")
        if self.comparison == "matrix":
            return keep_largest(scores.reshape(1, -1), self.sparsity).view(scores.shape)
        return keep_largest(scores, self.sparsity)

    def violation(self, keep: torch.Tensor) -> str | None:
        if self.comparison == "global":
            return None
        rows = keep.reshape(1, -1) if self.comparison == "matrix" else keep
        allowed = rows.shape[1] - pruned_count(self.sparsity, rows.shape[1])
        worst = int(rows.sum(1, dtype=torch.int32).max()) if rows.numel() else 0
        return f"keeps {worst} of {rows.shape[1]}, allowed {allowed}" if worst > allowed else None


@dataclass(frozen=True)
class NM(SparsityPattern):
    """Keeps at most n of every m consecutive weights along the input dimension ("2:4" keeps 2).

    Args:
        n: Weights kept in a group.
        m: Length of a group; n < m.
        remainder: What to do when m does not divide the width: `refuse`, or `pad` (the short last
            group competes as if filled up with zeros, so it keeps at most n of what it has).
    """

    n: int
    m: int
    remainder: Remainder = "refuse"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PatternError(
                f"{self.n}:{self.m} is not a sparsity pattern",
                next_step="N:M keeps N of every M weights: 0 < N < M, as in 2:4",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (" pad" if self.remainder == "pad" else "")

    def refusal(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.m and self.remainder == "refuse":
            return f"the input width {shape[1]} is not a multiple of {self.m}"
        return None

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        self._check(scores)
        rows, width = scores.shape
        padded = torch.nn.functional.pad(scores, (0, -width % self.m), value=-math.inf)
        groups = padded.reshape(-1, self.m)
        keep = _keep_in_groups(groups, self.n)
        return keep.view(rows, -1)[:, :width].contiguous()

    def violation(self, keep: torch.Tensor) -> str | None:
        if self.refusal((keep.shape[0], keep.shape[1])) is not None:
            return self.refusal((keep.shape[0], keep.shape[1]))
        padded = torch.nn.functional.pad(keep, (0, -keep.shape[1] % self.m))
        # Sums of bytes are ten times as fast as those of booleans.
        groups = padded.view(torch.uint8).reshape(keep.shape[0], -1, self.m)
        kept = groups.sum(2, dtype=torch.uint8 if self.m < 256 else torch.int64)
        if not kept.numel() or int(kept.max()) <= self.n:
            return None
        row, group = divmod(int(kept.argmax()), kept.shape[1])
        return f"row {row}, group {group} keeps {int(kept.max())} of {self.m}"


@dataclass(frozen=True)
class Block(SparsityPattern):
    """Prunes whole blocks: the floor(sparsity * blocks) blocks with the least summed score.

    Args:
        rows: Block height (outputs).
        columns: Block width (inputs).
        sparsity: Share of blocks to prune, in [0, 1).
    """

    rows: int
    columns: int
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.rows < 1 or self.columns < 1:
            raise PatternError(f"a block of {self.rows}x{self.columns} is empty")

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}:{self.sparsity}"

    def refusal(self, shape: tuple[int, int]) -> str | None:
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"{shape[0]}x{shape[1]} cannot be cut into {self.rows}x{self.columns} blocks"
        return None

    def _blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out / rows, in / columns, rows, columns]."""
        out, width = tensor.shape
        return tensor.reshape(
            out // self.rows, self.rows, width // self.columns, self.columns
        ).permute(0, 2, 1, 3)

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        self._check(scores)
        totals = self._blocks(scores).sum((2, 3), dtype=torch.float64)
        keep = keep_largest(totals.reshape(1, -1), self.sparsity).view(totals.shape)
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def violation(self, keep: torch.Tensor) -> str | None:
        reason = self.refusal((keep.shape[0], keep.shape[1]))
        if reason is not None:
            return reason
        live = self._blocks(keep).any(3).any(2)
        allowed = live.numel() - pruned_count(self.sparsity, live.numel())
        kept = int(live.sum())
        return f"{kept} blocks hold weights, allowed {allowed}" if kept > allowed else None


def parse_pattern(text: str | float | SparsityPattern) -> SparsityPattern:
    """Reads `2:4`, `4:8 pad`, `50%`, `0.5`, `0.5 matrix` or `block:16x16:0.5`.

    Raises:
        PatternError: The text is not a pattern.
    """
    if isinstance(text, SparsityPattern):
        return text
    words = str(text).strip().lower()
    if found := re.fullmatch(r"(\d+):(\d+)( pad)?", words):
        return NM(int(found[1]), int(found[2]), "pad" if found[3] else "refuse")
    if found := re.fullmatch(r"block:(\d+)x(\d+):([\d.]+(?:e-?\d+)?%?)", words):
        return Block(int(found[1]), int(found[2]), _share(found[3], words))
    if found := re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?%?)( row| matrix| global)?", words):
        comparisons: dict[str | None, Comparison] = {" matrix": "matrix", " global": "global"}
        return Unstructured(_share(found[1], words), comparisons.get(found[2], "row"))
    raise PatternError(
        f"{text!r} is not a sparsity pattern",
        next_step='write "2:4" (keep 2 of 4), "50%", "0.5 matrix" or "block:16x16:0.5"',
    )


def _share(number: str, whole: str) -> float:
    try:
        return float(Fraction(number[:-1]) / 100) if number.endswith("%") else float(number)
    except (ValueError, ZeroDivisionError) as error:
        raise PatternError(f"{whole!r} is not a sparsity pattern") from error


def check_sparsity(sparsity: float) -> None:
    """Raises PatternError unless the share is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise PatternError(
            f"sparsity {sparsity!r} is outside [0, 1)",
            next_step="sparsity is the share of weights that become zero, such as 0.5",
        )


def pruned_count(sparsity: float, n: int) -> int:
    """Returns floor(sparsity * n), in exact decimal arithmetic (0.29 of 100 is 29, not 28)."""
    return math.floor(Fraction(repr(float(sparsity))) * n)


def keep_largest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keeps all but the floor(sparsity * n) least scores of each row, ties by position.

    Args:
        scores: [rows, n], finite.
        sparsity: Share to prune, in [0, 1).

    Returns:
        Boolean [rows, n].
    """
    return ~least_of_rows(scores, pruned_count(sparsity, scores.shape[1]))


def least_of_rows(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Marks the least scores of each row, ties by position.

    Equal to a stable ascending sort whose first entries are marked, and many times faster: the
    count-th value is selected, and only entries equal to it are counted in order.

    Args:
        scores: [rows, n], without NaN.
        count: How many in every row, or int64 [rows, 1]; at most n.

    Returns:
        Boolean [rows, n].
    """
    if isinstance(count, int) and (count == 0 or scores.numel() == 0):
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _values_at(scores, count)
    marked = scores <= threshold
    if isinstance(count, torch.Tensor):
        marked &= count > 0
    if bool((marked.sum(1, keepdim=True) == count).all()):
        return marked
    below = scores < threshold
    equal = marked & ~below
    spare = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= spare))


def _values_at(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Returns the count-th least value of each row, [rows, 1]."""
    if isinstance(count, torch.Tensor):
        # NumPy sorts and selects with vector instructions, which torch does not.
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
        return ordered.gather(1, (count - 1).clamp_min(0))
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.kthvalue(count, dim=1, keepdim=True).values
    selected = np.partition(scores.numpy(), count - 1, axis=1)
    return torch.from_numpy(selected[:, count - 1 : count].copy())


def _keep_in_groups(groups: torch.Tensor, n: int) -> torch.Tensor:
    """Keeps the n largest of each row of [g, m]; for a small m ranking by comparison is fastest."""
    m = groups.shape[1]
    if m > 16:
        order = groups.argsort(dim=1, stable=True)
        keep = torch.ones_like(groups, dtype=torch.bool)
        return keep.scatter_(1, order[:, : m - n], False)
    columns = [groups[:, j].contiguous() for j in range(m)]
    rank = [torch.zeros(len(groups), dtype=torch.uint8, device=groups.device) for _ in range(m)]
    for i in range(m):
        for j in range(i):
            # Of two equal scores the earlier one, j, ranks lower and is pruned first.
            earlier_is_lower = columns[j] <= columns[i]
            rank[i] += earlier_is_lower
            rank[j] += ~earlier_is_lower
    return torch.stack([r >= m - n for r in rank], 1)
