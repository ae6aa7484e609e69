"""Sensitivity: errors as a plain loop over tokens finds them, and the share of outliers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from zeroskip.ir.patterns import Comparison, Unstructured
from zeroskip.ir.sensitivity import error_curve, outlier_share, output_errors

PROBES = (0.1, 0.29, 0.5, 0.75, 0.9)


def by_hand(
    weight: torch.Tensor, x: torch.Tensor, sparsity: float, comparison: Comparison
) -> float:
    """Prunes as Wanda's loop does, and runs every token through what was lost."""
    scores = weight.abs() * x.norm(dim=0)
    lines = scores.reshape(1, -1) if comparison == "matrix" else scores
    lost = torch.zeros(lines.shape, dtype=torch.bool)
    for line, marks in zip(lines, lost, strict=True):
        order = sorted(range(len(line)), key=lambda j: (float(line[j]), j))
        marks[order[: int(len(line) * sparsity + 1e-9)]] = True
    gone = (weight * lost.view(weight.shape)).double()
    whole = float((x.double() @ weight.double().T).square().sum())
    return float((x.double() @ gone.T).square().sum()) / whole


@pytest.mark.parametrize("comparison", ["row", "matrix"])
@pytest.mark.parametrize("shape", [(12, 20), (1, 20), (12, 1), (20, 7)])
@pytest.mark.parametrize("tokens", [3, 64])  # 3: the Gram matrix lacks rank.
def test_errors(comparison: Comparison, shape: tuple[int, int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator) + 0.3
    x[:, :1] *= 1 if shape[1] == 1 else 0  # A dead input channel,
    weight[0] *= 1 if shape[0] == 1 else 0  # a dead row,
    weight[-1] = weight[-1].sign()  # and ties.
    errors = output_errors(weight, x.T @ x, PROBES, Unstructured(0.5, comparison))
    for probe, error in zip(PROBES, errors, strict=True):
        assert error == pytest.approx(by_hand(weight, x, probe, comparison), rel=1e-4, abs=1e-6)


def test_a_linear_without_output_costs_nothing() -> None:
    target = Unstructured(0.5)
    assert output_errors(torch.zeros(4, 8), torch.eye(8), (0.5, 0.9), target) == (0, 0)
    assert output_errors(torch.ones(4, 8), torch.zeros(8, 8), (0.5, 0.9), target) == (0, 0)


def test_curves_go_through_what_was_measured_and_rise() -> None:
    curve = error_curve((0.01, 0.05, 0.4), (0.3, 0.5, 0.9), 100)
    assert len(curve) == 101
    assert [curve[k] for k in (0, 30, 50, 90, 100)] == pytest.approx([0, 0.01, 0.05, 0.4, 1])
    assert all(a < b for a, b in itertools.pairwise(curve))
    assert curve[15] == pytest.approx(0.01 / 8)  # A cube from zero on.


def test_outliers_as_published() -> None:
    """Port of check_outlier_mean of the public code, over the concatenated scores of a layer."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(s, generator=generator).abs() ** 3 for s in ((8, 12), (20, 8))]
    layer = np.concatenate([s.numpy().ravel() for s in scores])
    for threshold in (3, 5, 7):
        expected = (layer > layer.mean() * threshold).sum() / layer.size
        assert outlier_share(scores, threshold) == pytest.approx(expected, abs=0)
    assert outlier_share([torch.zeros(4, 4)], 5) == 0
    assert outlier_share([], 5) == 0
