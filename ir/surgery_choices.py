"""Which weights go when a linear is pruned column by column, for every pattern.

Weights compete within some columns at a time, for the columns after them have not yet taken over all
errors. How many go in each such part is decided beforehand, so that the pattern's own count holds for
the whole: from what each weight costs when no other makes up for it, w^2 H_jj. (Costs after the later
columns have made up for it, w^2 R_jj^2, would send more into the first columns than the last ones can
bear, above all where H was measured on few tokens.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from zeroskip.ir.errors import PatternError
from zeroskip.ir.patterns import (
    NM,
    Block,
    SparsityPattern,
    Unstructured,
    least_of_rows,
    pruned_count,
)


class Choice(ABC):
    """Decides which weights go, for `width` columns at a time."""

    width: int

    @abstractmethod
    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """Returns what is pruned, boolean [columns, out].

        Args:
            start: The first of the columns, a multiple of `width`.
            weight: The columns, having taken over all errors before them, [columns, out].
            root: Their part of the root of the Hessian, [columns, columns].
        """


def choice_of(
    pattern: SparsityPattern | torch.Tensor, weight: torch.Tensor, root: torch.Tensor, width: int
) -> Choice:
    """Returns what decides for a pattern.

    Args:
        pattern: To prune to, or what to keep, boolean [out, in].
        weight: [in, out], before anything is pruned.
        root: The root of the Hessian, [in, in].
        width: Columns that compete, but for groups and blocks that are wider.

    Raises:
        PatternError: The pattern compares linears with one another.
    """
    if isinstance(pattern, torch.Tensor):
        return _Given(pattern, width)
    if isinstance(pattern, NM):
        return _Groups(pattern)
    if isinstance(pattern, Block):
        return _Blocks(pattern, weight, root, width)
    if isinstance(pattern, Unstructured) and pattern.comparison == "row":
        return _Rows(pattern, weight, root, width)
    if isinstance(pattern, Unstructured) and pattern.comparison == "matrix":
        return _Matrix(pattern, width)
    raise PatternError(f"{pattern} cannot be decided for one matrix alone")


def losses(weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Returns by how much pruning each weight alone raises the squared error, [columns, out]."""
    found: torch.Tensor = (weight * root.diagonal()[:, None]).square_()
    return found


def _bare_losses(weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Returns the same where no other weight makes up for it, [in, out]; H_jj is |row j of R|^2."""
    found: torch.Tensor = (weight * torch.linalg.vector_norm(root, dim=1)[:, None]).square_()
    return found


class _Given(Choice):
    """What goes is known."""

    def __init__(self, keep: torch.Tensor, width: int) -> None:
        self.keep, self.width = keep, width

    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        return ~self.keep[:, start : start + len(weight)].T


class _Groups(Choice):
    """The least of each group of N:M; a short last group keeps at most N of what it has."""

    def __init__(self, pattern: NM) -> None:
        self.width, self.kept = pattern.m, pattern.n
        # Of each pair i > j, whether j is the lesser (also when equal: ties go by position) adds
        # one to the rank of i, or else of j.
        m = pattern.m
        self.later, self.earlier = torch.tril_indices(m, m, -1)
        self.ranks = torch.zeros(m, len(self.later))
        pairs = torch.arange(len(self.later))
        self.ranks[self.later, pairs] = 1
        self.ranks[self.earlier, pairs] = -1
        self.lowest = torch.arange(m - 1, -1, -1.0)[:, None]

    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        scores = losses(weight, root)
        count = len(scores) - self.kept
        if len(scores) < self.width or self.width > 16:
            return least_of_rows(scores.T.contiguous(), max(count, 0)).T
        later_is_more = (scores[self.earlier] <= scores[self.later]).float()
        return torch.addmm(self.lowest, self.ranks, later_is_more) < count


class _Matrix(Choice):
    """The least of all rows together, the same share of all columns, as published."""

    def __init__(self, pattern: Unstructured, width: int) -> None:
        self.sparsity, self.width = pattern.sparsity, width

    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        columns, rows = weight.shape
        before, after = (pruned_count(self.sparsity, n * rows) for n in (start, start + columns))
        scores = losses(weight, root).T.reshape(1, -1)
        return least_of_rows(scores, after - before).view(rows, columns).T


class _Rows(Choice):
    """The least of each row."""

    def __init__(
        self, pattern: Unstructured, weight: torch.Tensor, root: torch.Tensor, width: int
    ) -> None:
        self.width = width
        scores = _bare_losses(weight, root).T.contiguous()
        pruned = least_of_rows(scores, pruned_count(pattern.sparsity, scores.shape[1]))
        starts = range(0, pruned.shape[1], width)
        self.counts = [pruned[:, i : i + width].sum(1, keepdim=True) for i in starts]

    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        scores = losses(weight, root).T.contiguous()
        return least_of_rows(scores, self.counts[start // self.width]).T


class _Blocks(Choice):
    """The least blocks, of all rows together."""

    def __init__(
        self, pattern: Block, weight: torch.Tensor, root: torch.Tensor, width: int
    ) -> None:
        self.pattern = pattern
        self.width = max(1, width // pattern.columns) * pattern.columns
        bare = _bare_losses(weight, root)
        size = pattern.columns
        starts = range(0, len(bare), size)
        totals = torch.stack([self._by_band(bare[i : i + size]) for i in starts], 1)
        pruned = self._least(totals, pruned_count(pattern.sparsity, totals.numel()))
        strips = self.width // size
        places = range(0, pruned.shape[1], strips)
        self.counts = [int(pruned[:, i : i + strips].sum()) for i in places]

    def prune(self, start: int, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        pruned = self._least(self._losses(weight, root), self.counts[start // self.width])
        columns = pruned.T.repeat_interleave(self.pattern.columns, 0)
        return columns.repeat_interleave(self.pattern.rows, 1)

    def _losses(self, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """Returns by how much pruning each block alone raises the error, [out / rows, in / columns].

        The weights of a row that go together make up for one another: |w R|^2 over the block.
        """
        totals = []
        for low in range(0, len(weight), self.pattern.columns):
            part = slice(low, low + self.pattern.columns)
            totals.append(self._by_band((root[part, part].T @ weight[part]).square_()))
        return torch.stack(totals, 1)

    def _by_band(self, losses: torch.Tensor) -> torch.Tensor:
        return losses.sum(0, dtype=torch.float64).view(-1, self.pattern.rows).sum(1)

    def _least(self, totals: torch.Tensor, count: int) -> torch.Tensor:
        return least_of_rows(totals.view(1, -1), count).view(totals.shape)
