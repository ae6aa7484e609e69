"""prune-ria: the scores of the published code, exact counts, and what it refuses."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

from tests.passes import references
from tests.small import small_program
from zeroskip.ir.errors import CompileError, PatternError, RequirementError
from zeroskip.ir.facts import Masks
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.passes import ApplyMasks, FoldScales, Observe, PassManager, PruneMagnitude, PruneRIA
from zeroskip.passes.prune_ria import relative_importance


def reference_scores(weight: Tensor, squares: Tensor, a: float) -> Tensor:
    """The published formula, element by element, in float64; 0 / 0 is 0."""
    size = weight.double().abs().tolist()
    rows = [sum(row) for row in size]
    columns = [sum(row[j] for row in size) for j in range(len(size[0]))]
    scores = [
        [
            ((w / columns[j] if w else 0.0) + (w / rows[i] if w else 0.0))
            * float(squares[j]) ** (a / 2)
            for j, w in enumerate(row)
        ]
        for i, row in enumerate(size)
    ]
    return torch.tensor(scores, dtype=torch.float64)


def with_statistics(
    program: Program, squares: Tensor, name: str = "up.weight", count: int = 1
) -> Program:
    zeros = torch.zeros_like(squares)
    edge = EdgeStatistics(count, zeros.double(), squares.double() * count, zeros.float())
    return program.with_fact(Statistics({name: edge}))


def with_weight(program: Program, weight: Tensor, name: str = "up.weight") -> Program:
    return program.with_weights({name: weight.to(program.weights.source(name).dtype)})


def kept_by(program: Program, step: PruneRIA, name: str = "up.weight") -> Tensor:
    return step(program).program.fact(Masks).masks[name].keep()


UP = ("up.weight",)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_scores_are_those_of_the_published_formula(a: float) -> None:
    squares = torch.rand(16, generator=torch.Generator().manual_seed(3)) * 9
    program = with_statistics(small_program("mlp"), squares)
    (linear,) = [n for n in find_linears(program) if n.name == "up.weight"]
    weight = linear.weight(program)
    found = PruneRIA(a=a).finite_scores(program, linear)
    assert found.dtype == torch.float32
    expected = reference_scores(weight, squares, a)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
@pytest.mark.parametrize("pattern", ["2:4", "50% matrix"])
def test_masks_of_models(name: str, pattern: str) -> None:
    program = Observe()(small_program(name)).program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Experts with few tokens.
        masks = PruneRIA(pattern)(program).program.fact(Masks).masks
    seen = program.fact(Statistics).edges
    chosen = [n for n in find_linears(program) if n.name in masks and seen[n.name].count >= 16]
    assert len(chosen) >= 4
    for linear in chosen:
        weight, edge = linear.weight(program), seen[linear.name]
        scores = reference_scores(weight, edge.total_of_squares / edge.count, 0.5)
        if pattern == "50% matrix":
            expected = references.keep_rows(scores.view(1, -1), 0.5).view(scores.shape)
        else:
            expected = references.keep(scores, pattern)
        found = masks[linear.name].keep()
        assert int(found.sum()) == int(expected.sum())
        # Scores that agree to float32 may change places.
        moved = found != expected
        assert int(moved.sum()) <= 2, linear.name


def test_rows_and_the_matrix_are_two_comparisons() -> None:
    """The published default is one threshold for the matrix; `50%` is exact in every row."""
    weight = torch.rand(24, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    weight[:, :8] *= 10
    weight[:4] *= 0.01  # Small rows have small shares of their columns.
    program = with_statistics(with_weight(small_program("mlp"), weight), torch.ones(16))
    rows = kept_by(program, PruneRIA("50%", include=UP))
    matrix = kept_by(program, PruneRIA("50% matrix", include=UP))
    assert rows.sum(1).eq(8).all()
    assert int(matrix.sum()) == 192
    assert not matrix.sum(1).eq(8).all()


def test_a_fixed_threshold_would_prune_more_than_asked() -> None:
    """Ties: the published code prunes every score up to the threshold."""
    program = with_weight(small_program("mlp"), torch.ones(24, 16))
    program = with_statistics(program, torch.ones(16))
    for pattern, count in (("50%", 192), ("50% matrix", 192), ("2:4", 192), ("25%", 288)):
        assert int(kept_by(program, PruneRIA(pattern, include=UP)).sum()) == count


@pytest.mark.parametrize("pattern", ["50%", "50% matrix", "2:4", "block:4x8:0.5"])
def test_zero_rows_and_columns_have_no_share(pattern: str) -> None:
    weight = torch.rand(24, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    weight[5], weight[:, [0, 7]] = 0, 0
    program = with_statistics(with_weight(small_program("mlp"), weight), torch.ones(16))
    (linear,) = [n for n in find_linears(program) if n.name == "up.weight"]
    scores = PruneRIA().finite_scores(program, linear)
    assert torch.isfinite(scores).all()
    assert not scores[5].any()
    assert not scores[:, [0, 7]].any()
    kept = kept_by(program, PruneRIA(pattern, include=UP))
    assert int(kept.sum()) == 192
    assert parse_pattern(pattern).violation(kept) is None
    # Nothing but zeros is no reason to fail either.
    dead = with_weight(program, torch.zeros(24, 16))
    assert int(kept_by(dead, PruneRIA(pattern, include=UP)).sum()) == 192


def test_dead_channels_are_pruned_first() -> None:
    squares = torch.ones(16)
    squares[[1, 3, 5, 9]] = 0
    program = with_statistics(small_program("mlp"), squares)
    kept = kept_by(program, PruneRIA("25%", include=UP))
    assert not kept[:, [1, 3, 5, 9]].any()
    # Without inputs in the score they are as good as others.
    assert kept_by(program, PruneRIA("25%", a=0.0, include=UP))[:, [1, 3, 5, 9]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    weight = torch.full((4096, 8), 100.0, dtype=dtype)  # The sum of a column is beyond float16.
    weight[0, 0] = 200
    shares = relative_importance(weight)
    assert shares.dtype == torch.float32
    expected = 200 / (100 * 4095 + 200) + 200 / 900
    assert float(shares[0, 0]) == pytest.approx(expected, rel=1e-6)


def test_one_row_and_one_column() -> None:
    row = torch.tensor([[1.0, -3.0, 0.0, 4.0]])
    torch.testing.assert_close(relative_importance(row), torch.tensor([[1.125, 1.375, 0.0, 1.5]]))
    torch.testing.assert_close(
        relative_importance(row.T), torch.tensor([[1.125, 1.375, 0.0, 1.5]]).T
    )
    huge = torch.full((2, 2), 3e38)  # Their sum is beyond float32.
    torch.testing.assert_close(relative_importance(huge), torch.ones(2, 2))


def test_the_same_masks_with_any_number_of_threads() -> None:
    program = Observe()(small_program("llama")).program
    threads = torch.get_num_threads()
    bits = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            masks = PruneRIA("50% matrix")(program).program.fact(Masks).masks
            bits.append({name: mask.bits for name, mask in masks.items()})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(bits[0][n], other[n]) for other in bits[1:] for n in bits[0])


def test_experts_with_few_tokens_are_pruned_by_magnitude() -> None:
    program = Observe()(small_program("moe")).program
    edges = program.fact(Statistics).edges
    name = "model.layers.0.mlp.experts.down_proj[1]"
    starved = dataclasses.replace(edges[name], count=3)
    program = program.with_fact(Statistics({**edges, name: starved}))
    with pytest.warns(UserWarning, match="by magnitude: fewer than 16 tokens"):
        masks = PruneRIA("2:4")(program).program.fact(Masks).masks
    expected = PruneMagnitude("2:4")(program).program.fact(Masks).masks
    assert torch.equal(masks[name].bits, expected[name].bits)


def test_scales_change_what_it_decides() -> None:
    """Unlike Wanda: a column that grows takes a larger share of its rows."""
    step = FoldScales("equalize")
    assert step.warning([PruneRIA("2:4")]) is None


@pytest.mark.parametrize("a", [-0.1, float("inf"), float("nan")])
def test_an_exponent_out_of_range_is_refused(a: float) -> None:
    with pytest.raises(CompileError, match="out of range") as caught:
        PruneRIA(a=a)
    assert caught.value.pass_name == "prune-ria"
    assert caught.value.next_step


def test_weights_and_scores_that_are_not_finite_are_refused() -> None:
    program = with_statistics(small_program("mlp"), torch.ones(16))
    weight = program.weights["up.weight"].clone()
    weight[2, 3] = float("nan")
    with pytest.raises(CompileError, match=r"nan at \[2, 3\]") as caught:
        PruneRIA(include=UP)(with_weight(program, weight))
    assert caught.value.where == "up.weight"
    loud = with_statistics(program, torch.full((16,), 1e60, dtype=torch.float64))
    with pytest.raises(CompileError, match="overflow") as caught:
        PruneRIA(a=2.0, include=UP)(loud)
    assert caught.value.where == "up.weight"


def test_comparison_across_linears_is_refused() -> None:
    with pytest.raises(PatternError, match="on a scale of its own"):
        PassManager([Observe(), PruneRIA("50% global")])(small_program("mlp"))


def test_a_linear_without_statistics_is_refused() -> None:
    steps = [Observe(exclude=("down",)), PruneRIA("2:4"), ApplyMasks()]
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.where == "down.weight"
