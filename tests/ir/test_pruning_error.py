"""What pruning did to a linear: the error of its output, and how its weights are spread."""

from __future__ import annotations

import pytest
import torch

from zeroskip.ir.pruning_error import (
    BINS,
    REACH,
    ROWS,
    SAMPLES,
    histogram,
    output_error,
    relative_change,
    root_mean_square,
    sample_weights,
)
from zeroskip.ir.statistics import EdgeStatistics


def edge(x: torch.Tensor, gram: bool) -> EdgeStatistics:
    exact = x.double()
    return EdgeStatistics(
        count=x.shape[0],
        total=exact.sum(0),
        total_of_squares=exact.square().sum(0),
        abs_max=x.abs().amax(0),
        gram=x.T @ x if gram else None,
    )


def pruned_pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(rows, columns, generator=generator)
    return before, before * (torch.rand(rows, columns, generator=generator) < 0.5)


def test_with_a_gram_matrix_it_is_the_error_of_the_output() -> None:
    before, after = pruned_pair(20, 16)
    mixed = torch.randn(400, 16) @ torch.randn(16, 16) + 3
    expected = (mixed @ (after - before).T).norm() / (mixed @ before.T).norm()
    assert output_error(before, after, edge(mixed, gram=True)) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_without_one_means_count_and_correlation_does_not() -> None:
    before, after = pruned_pair(64, 32)
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1)) + 2
    expected = (x @ (after - before).T).norm() / (x @ before.T).norm()
    assert output_error(before, after, edge(x, gram=False)) == pytest.approx(
        float(expected), rel=0.02
    )


def test_some_rows_stand_for_many() -> None:
    before, after = pruned_pair(8 * ROWS + 3, 24)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1))
    expected = (x @ (after - before).T).norm() / (x @ before.T).norm()
    assert output_error(before, after, edge(x, gram=True)) == pytest.approx(
        float(expected), rel=0.05
    )


def test_nothing_lost_and_nothing_there() -> None:
    before, _ = pruned_pair(4, 8)
    seen = edge(torch.randn(10, 8), gram=True)
    assert output_error(before, before, seen) == 0
    assert output_error(torch.zeros(4, 8), torch.zeros(4, 8), seen) == 0
    assert relative_change(torch.zeros(4), torch.zeros(4)) == 0
    assert relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == 0.8


def test_a_sample_sees_every_place_of_a_pattern() -> None:
    weight = torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat(5 * SAMPLES // 4).view(5, -1)
    sample = sample_weights(weight)
    assert sample.numel() <= weight.numel() // 4
    shares = [float((sample == value).float().mean()) for value in (0, 1, 2)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=1e-4)


def test_a_histogram_leaves_zeros_out_and_loses_nothing_else() -> None:
    values = torch.tensor([0.0, 0.1, -0.1, 1e9, -1e9, 0.0])
    counts = histogram(values, unit=1.0)
    assert (len(counts), sum(counts)) == (BINS, 4)
    assert counts[0] == counts[-1] == 1
    assert counts[BINS // 2 - 1] == counts[BINS // 2] == 1
    assert REACH * root_mean_square(torch.tensor([3.0, 4.0])) == pytest.approx(4 * 12.5**0.5)
    assert sum(histogram(torch.zeros(3), unit=0.0)) == 0
