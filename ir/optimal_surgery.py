"""Optimal brain surgery of one linear, column by column: choose what goes, let the rest make up.

With the Hessian H = sum x x^T + damping, H = R R^T and R upper triangular, a column of weights that
has taken over all errors of the columns k before it is

    w'_j = w_j + sum_k<j (w_k - q_k) R_kj / R_jj

where q_k is what became of column k: w'_k where it is kept, 0 where it is pruned. Pruning w'_j raises
the squared error of the output by (w'_j R_jj)^2, the columns after it having made up for it. The
published form carries U = R^-1, the upper Cholesky factor of H^-1, from which the same follows. Here
one factorisation takes the place of two and an inverse, and only small blocks are inverted.

Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, section 3 and algorithm 1; their
1 / [H^-1]_jj, of the columns still to come, is R_jj^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.errors import CompileError
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.surgery_choices import Choice, choice_of

# Columns that are worked off one by one; what is wider is cut in two.
_LEAF = 8
# Damping is raised tenfold until the Hessian can be factorised, up to the mean of its diagonal.
_MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class HessianRoot:
    """A damped Hessian as the product of a triangular matrix with its transpose.

    Args:
        root: R, upper triangular, positive diagonal, float32 [in, in]; H = R R^T.
        dead: Which inputs were always zero, boolean [in].
        damping: What was added to the diagonal, as a share of its mean.
    """

    root: torch.Tensor
    dead: torch.Tensor
    damping: float


def hessian_root(
    gram: torch.Tensor, damping: float, divisors: torch.Tensor | None = None
) -> HessianRoot:
    """Factorises a Gram matrix: in float32, else in float64, else with ten times the damping.

    An input that was always zero gets a diagonal of 1: it tells nothing about the others.

    Args:
        gram: Sum of x x^T, float32 [in, in]; left as it is. Its scale does not matter.
        damping: Share of the mean of the diagonal that is added to it.
        divisors: What the inputs were divided by since they came out of the model, [in]; damping is
            that of the inputs before, so that no division changes what is pruned.

    Raises:
        CompileError: It is not finite, or no sum of x x^T, so that even much damping does not help.
    """
    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal).all():
        raise CompileError(
            "the Gram matrix of its inputs is not finite",
            next_step="look for extreme activations in the calibration data",
        )
    dead = diagonal == 0
    # With x = D x': sum x x^T + c is D (sum x' x'^T + c / D^2) D.
    squares = torch.ones(len(diagonal)) if divisors is None else divisors.square()
    unit = (diagonal.double() * squares).mean() / squares
    while True:
        for dtype in (torch.float32, torch.float64):
            root = _upper_root(gram, dead, damping * unit, dtype)
            if root is not None:
                return HessianRoot(root, dead, damping)
        if damping >= _MOST_DAMPING:
            raise CompileError(
                "the Gram matrix of its inputs has no Cholesky factor, not even with "
                f"{damping:g} times the mean of its diagonal added",
                next_step="no sum of x x^T is like that: look at the calibration data, or leave "
                "this linear to a pass that needs no Gram matrix, with exclude",
            )
        damping = min(max(10 * damping, 1e-6), _MOST_DAMPING)


def _upper_root(
    gram: torch.Tensor, dead: torch.Tensor, added: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns R with R R^T = gram + added, or None when rounding leaves no positive pivot.

    LAPACK knows lower factors, from the top left. That of the matrix turned by half a turn, turned
    back, is upper. It is computed in place, so that one copy of the matrix is alive beside the Gram
    matrix and one while it is turned.
    """
    turned = gram.to(dtype).flip(0, 1).mT
    turned.diagonal().add_(dead.flip(0)).add_(added.flip(0).to(dtype))
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(turned, out=(turned, info))
    diagonal = turned.diagonal()
    if int(info) or not bool((torch.isfinite(diagonal) & (diagonal > 0)).all()):
        return None
    return turned.float().flip(0, 1).triu_()


def prune_columns(
    weight: torch.Tensor,
    hessian: HessianRoot,
    pattern: SparsityPattern | torch.Tensor,
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes a weight from the first column to the last.

    Args:
        weight: float32 [out, in]; left as it is.
        hessian: Of its inputs.
        pattern: What to prune to, or what to keep, boolean [out, in].
        block_size: Columns among which weights compete at a time; no group or block is ever cut.

    Returns:
        The new weight, float32 [out, in], and what is kept of it, boolean [out, in].
    """
    width = weight.shape[1]
    # Columns are rows here, so that each lies in one piece.
    columns = weight.masked_fill(hessian.dead, 0).T.contiguous()
    choice = choice_of(pattern, columns, hessian.root, min(block_size, width))
    # sum_k (w_k - q_k) R_kj over the columns k that are done.
    carried = torch.zeros_like(columns)
    updated = torch.empty_like(weight, memory_format=torch.contiguous_format)
    keep = torch.empty_like(updated, dtype=torch.bool)
    size = -(-block_size // choice.width) * choice.width
    for start in range(0, width, size):
        block = slice(start, min(start + size, width))
        root = hessian.root[block, block]
        identity = torch.eye(len(root))
        inverse = torch.linalg.solve_triangular(root, identity, upper=True)
        current = torch.addmm(columns[block], inverse.T, carried[block])
        surgery = _Surgery(current, root, inverse, choice, start)
        surgery.work(0, len(root))
        kept = surgery.weight.masked_fill_(surgery.pruned, 0)
        change = columns[block].sub_(kept)
        carried[block.stop :].addmm_(hessian.root[block, block.stop :].T, change)
        updated[:, block] = kept.T.contiguous()
        keep[:, block] = ~surgery.pruned.T.contiguous()
    return updated, keep


class _Surgery:
    """What becomes of some columns that have taken over all errors before them.

    Args:
        weight: The columns, [columns, out]; written into.
        root: Their part of R.
        inverse: Its inverse.
        choice: What decides which weights go.
        start: Their place among all columns.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        root: torch.Tensor,
        inverse: torch.Tensor,
        choice: Choice,
        start: int,
    ) -> None:
        self.weight, self.root, self.inverse = weight, root, inverse
        self.choice, self.start = choice, start
        self.pruned = torch.empty_like(weight, dtype=torch.bool)
        # (w' - q) R_jj: what the columns after column j are to make up for.
        self.errors = torch.empty_like(weight)

    def work(self, low: int, high: int, chosen: bool = False) -> None:
        """Prunes columns low to high, which have taken over all errors before low."""
        if not chosen and high - low <= self.choice.width:
            self._choose(low, high)
            chosen = True
        if chosen and high - low <= _LEAF:
            self._work_one_by_one(low, high)
            return
        # What is chosen together is not cut before it is chosen.
        unit = 1 if chosen else self.choice.width
        middle = low + -(-(high - low) // (2 * unit)) * unit
        self.work(low, middle, chosen)
        factors, errors = self.inverse[low:middle, middle:high], self.errors[low:middle]
        self.weight[middle:high].addmm_(factors.T, errors, alpha=-1)
        self.work(middle, high, chosen)

    def _choose(self, low: int, high: int) -> None:
        root, pruned = self.root[low:high, low:high], self.pruned[low:high]
        pruned.copy_(self.choice.prune(self.start + low, self.weight[low:high], root))
        # What a column is to be multiplied by to become its errors.
        torch.mul(pruned, root.diagonal()[:, None], out=self.errors[low:high])

    def _work_one_by_one(self, low: int, high: int) -> None:
        for j in range(low, high):
            column = self.weight[j]
            if j > low:
                column.addmv_(self.errors[low:j].T, self.inverse[low:j, j], alpha=-1)
            self.errors[j].mul_(column)
