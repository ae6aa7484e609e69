"""Linear sum assignment: each row to a column of its own, at the least cost in all."""

from __future__ import annotations

import numpy as np
import torch


def cheapest_assignment(cost: torch.Tensor) -> torch.Tensor:
    """Returns the column of each row in an assignment of least total cost, int64 [n].

    Shortest augmenting paths (Jonker and Volgenant, "A Shortest Augmenting Path Algorithm for Dense
    and Sparse Linear Assignment Problems", 1987): exact, O(n^3) at worst, vectorised over columns.

    Args:
        cost: [n, n], finite.
    """
    matrix = cost.detach().double().numpy()
    count = len(matrix)
    # Dual prices of the columns; with the cheapest row of each column no reduced cost is negative.
    price = matrix.min(0) if count else np.zeros(0)
    row_of = np.full(count, -1)
    column_of = np.full(count, -1)
    for column in range(count):
        row = int(matrix[:, column].argmin())
        if column_of[row] < 0:
            row_of[column], column_of[row] = row, column
    due = np.zeros(count)  # Dual prices of the rows.
    for left in np.flatnonzero(column_of < 0).tolist():
        _augment(matrix, left, price, due, row_of, column_of)
    return torch.from_numpy(column_of)


def _augment(
    matrix: np.ndarray,
    start: int,
    price: np.ndarray,
    due: np.ndarray,
    row_of: np.ndarray,
    column_of: np.ndarray,
) -> None:
    """Assigns one more row along the shortest path of reduced costs to a free column."""
    count = len(matrix)
    distance = np.full(count, np.inf)
    before = np.full(count, -1)  # The row from which each column was reached.
    reached = np.zeros(count, dtype=bool)
    row, so_far = start, 0.0
    while True:
        through = so_far + matrix[row] - due[row] - price
        nearer = ~reached & (through < distance)
        distance[nearer] = through[nearer]
        before[nearer] = row
        column = int(np.where(reached, np.inf, distance).argmin())
        reached[column] = True
        so_far = float(distance[column])
        if row_of[column] < 0:
            break
        row = int(row_of[column])
    inner = reached & (row_of >= 0)
    due[start] += so_far
    due[row_of[inner]] += so_far - distance[inner]
    price[inner] -= so_far - distance[inner]
    while True:
        row = int(before[column])
        row_of[column], column, column_of[row] = row, int(column_of[row]), column
        if row == start:
            return
