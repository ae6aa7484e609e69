"""Norms of a weight under row and column scales, differentiable in the scales."""

from __future__ import annotations

import torch

WARM_UP = 20  # Iterations that bring random vectors near the largest singular pair.


class PowerIteration:
    """The spectral norm of diag(r) W diag(c) while r and c change slowly.

    One step of power iteration brings the singular vectors of the last call up to date; u^T W v is
    then differentiable (Miyato et al., arXiv 1802.05957).

    Args:
        weight: W, float32 [out, in].
        generator: Draws the first vectors.
    """

    def __init__(self, weight: torch.Tensor, generator: torch.Generator) -> None:
        self._weight = weight
        self._left = torch.randn(weight.shape[0], generator=generator)
        self._right = torch.randn(weight.shape[1], generator=generator)
        one = torch.ones(())
        for _ in range(WARM_UP):
            self._step(one, one)

    def _step(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self._right = _unit(columns * (self._weight.T @ (rows * self._left)))
        self._left = _unit(rows * (self._weight @ (columns * self._right)))

    def __call__(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Returns the norm, a scalar.

        Args:
            rows: r, [out].
            columns: c, [in].
        """
        with torch.no_grad():
            self._step(rows, columns)
        return (rows * self._left) @ (self._weight @ (columns * self._right))


def _unit(vector: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp(min=1e-30)


def frobenius_norm(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns the Frobenius norm of diag(r) W diag(c), a scalar."""
    return (rows.square() @ (weight.square() @ columns.square())).clamp(min=1e-30).sqrt()


def largest_column_sum(
    weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Returns the operator norm of diag(r) W diag(c) for p = 1, a scalar."""
    return (columns * (weight.abs().T @ rows)).max()
