"""Sparse least squares by ADMM: which weights to keep when those that stay may change.

    min over D of  tr((W - D) G (W - D)^T),    D obeys a pattern

The problem is split into a dense half B, which has the error, and a sparse half D, which has the
pattern, and a dual V pulls them together:

    B = (G + rho I)^-1 (W G - V + rho D)
    D = the projection of B + V / rho on the pattern
    V = V + rho (B - D)

While rho is small B follows the error; as it grows B follows D and the support settles. The inverse
comes from a Cholesky factorisation whenever rho changes: the few that are needed cost less than the
one eigendecomposition from which all of them could be had.
"""

from __future__ import annotations

import torch

from zeroskip.ir.errors import CompileError
from zeroskip.ir.patterns import NM, Block, SparsityPattern, Unstructured
from zeroskip.ir.support_refinement import row_errors
from zeroskip.ir.weights import zero_outside

# The support is looked at every so many iterations; when more than this share of it has changed,
# rho grows by this factor, and by `_SLOWEST` when less has.
_LOOK = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2))
_SLOWEST = 1.1
# As long as the support has never moved, rho is divided by this, down to a share of the first.
_DESCENT = 5.0
_LEAST = 1e-3
_MOST = 1e6
# After so many iterations, a support that changes by less than this share is settled.
_SETTLING = 30
_SETTLED = 0.0003


def sparse_weight(
    weight: torch.Tensor,
    gram: torch.Tensor,
    pattern: SparsityPattern,
    rho: float = 0.1,
    iterations: int = 300,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a weight of little error that obeys the pattern, float32, and what it keeps, boolean.

    No larger error than that of the projection of the weight itself, nor of any iterate that was
    looked at: row by row where rows have a choice of their own, else in sum.

    Args:
        weight: Float32 [out, in], of a size around 1.
        gram: Float32 [in, in] with ones on the diagonal, positive definite.
        pattern: What to prune to.
        rho: The penalty to start with.
        iterations: At most so many.
    """
    target = weight @ gram
    keep = _project(weight, pattern)
    kept = max(int(keep.sum()), 1)
    sparse = zero_outside(weight, keep)
    best = _Best(weight, gram, pattern, sparse, keep)
    first, support, dual = sparse, keep, torch.zeros_like(weight)
    penalty, moved = rho, False
    inverse = _inverse(gram, penalty)
    for iteration in range(1, iterations + 1):
        dense = torch.add(target, sparse, alpha=penalty).sub_(dual) @ inverse
        pulled = torch.add(dense, dual, alpha=1 / penalty)
        keep = _project(pulled, pattern)
        sparse = zero_outside(pulled, keep)
        dual = (pulled - sparse).mul_(penalty)
        if iteration % _LOOK and iteration < iterations:
            continue
        changed = int((keep != support).sum())
        support = keep
        share = changed / kept
        if share <= _GROWTH[0][0] or iteration == iterations:
            best.consider(zero_outside(dense, keep), keep)
        if (moved and not changed) or (iteration > _SETTLING and share < _SETTLED):
            break
        factor = next((growth for least, growth in _GROWTH if share > least), None)
        if factor is not None or moved:
            moved = True
            penalty = min(penalty * (factor or _SLOWEST), _MOST)
        else:
            # Too stiff from the start: D has hardly left the projection of the weight.
            penalty /= _DESCENT
            if penalty < rho * _LEAST:
                break
            if changed:
                sparse, dual = first, torch.zeros_like(weight)
        inverse = _inverse(gram, penalty)
    return best.weight, best.keep


class _Best:
    """The candidate with the least error so far, for each row where the pattern lets rows choose."""

    def __init__(
        self,
        target: torch.Tensor,
        gram: torch.Tensor,
        pattern: SparsityPattern,
        weight: torch.Tensor,
        keep: torch.Tensor,
    ) -> None:
        self.target, self.gram = target, gram
        self.by_row = isinstance(pattern, NM) or (
            isinstance(pattern, Unstructured) and pattern.comparison == "row"
        )
        self.weight, self.keep = weight, keep
        self.errors = row_errors(target - weight, gram)

    def consider(self, weight: torch.Tensor, keep: torch.Tensor) -> None:
        errors = row_errors(self.target - weight, self.gram)
        better = errors < self.errors
        if not self.by_row:
            better = (errors.sum() < self.errors.sum()).expand(len(errors))
        if better.all():
            self.weight, self.keep, self.errors = weight, keep, errors
        elif better.any():
            rows = better.unsqueeze(1)
            self.weight = torch.where(rows, weight, self.weight)
            self.keep = torch.where(rows, keep, self.keep)
            self.errors = torch.where(better, errors, self.errors)


def _project(values: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """What the nearest matrix that obeys the pattern keeps: a block goes by its sum of squares."""
    return pattern.project(values.square() if isinstance(pattern, Block) else values.abs())


def _inverse(gram: torch.Tensor, penalty: float) -> torch.Tensor:
    stiff = gram.clone()
    stiff.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(stiff)
    if failed:
        raise CompileError(
            "the Gram matrix of its inputs is not positive",
            next_step="more damping, or more calibration data",
        )
    return torch.cholesky_inverse(factor)
