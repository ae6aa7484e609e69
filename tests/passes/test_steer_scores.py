"""steer-scores: masks with less error, as many weights, and none at all where it does not help."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.kept_traces import capture_once as capture
from tests.passes.references import keep
from tests.small import SMALL, small_program
from tests.zoo import ZOO
from zeroskip.ir.errors import PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import Masks
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import ScoreMultipliers, Statistics, Steering
from zeroskip.passes import (
    ApplyMasks,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    SteerScores,
)
from zeroskip.passes.steer_scores import ROWS, learn_multipliers, squared_error

PATTERNS = ("50%", "2:4", "4:8", "30% matrix")


@functools.cache
def zoo_program(name: str) -> Program:
    entry = ZOO[name]
    batches = [entry.inputs(2, 33), entry.inputs(3, 20, padded=True), entry.inputs(1, 40)]
    return dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram matrix of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=generator)
    x = (
        x @ torch.randn(columns, columns, generator=generator) * columns**-0.5
        + x.abs().mean(1)[:, None]
    )
    return torch.randn(rows, columns, generator=generator), x.T @ x


def masks_of(program: Program, *steps: Pass) -> dict[str, torch.Tensor]:
    masks = PassManager(steps)(program).program.fact(Masks).masks
    return {name: mask.keep() for name, mask in masks.items()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_descent_lowers_the_error_and_keeps_the_count(pattern: str) -> None:
    chosen = parse_pattern(pattern)
    for seed, rows in ((0, 40), (1, ROWS + 30)):
        weight, gram = correlated(rows, 64, seed)
        scores = weight.abs() * gram.diagonal().sqrt()
        found = learn_multipliers(weight, scores, gram, chosen)
        assert found.dtype == torch.float32
        assert bool((found > 0).all())
        plain, steered = chosen.project(scores), chosen.project(scores * found)
        before, after = (squared_error(weight, k, gram) for k in (plain, steered))
        assert after < 0.97 * before
        assert int(steered.sum()) == int(plain.sum())
        assert chosen.violation(steered) is None
        assert torch.equal(found, learn_multipliers(weight, scores, gram, chosen))


def test_the_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 16, generator=generator), torch.randn(8, 16, generator=generator)
    mask = keep(weight.abs(), "2:4")
    expected = float((x @ weight.T - x @ (weight * mask).T).square().sum())
    assert squared_error(weight, mask, x.T @ x) == pytest.approx(expected, rel=1e-5)


def test_one_flip_costs_what_it_is_said_to() -> None:
    from zeroskip.passes.steer_scores import _flip_costs

    weight, gram = correlated(4, 8)
    weight, gram = weight.double(), gram.double()
    mask = keep(weight.abs(), "2:4")
    costs = _flip_costs(weight, mask, gram)
    before = squared_error(weight, mask, gram)
    for i in range(4):
        for j in range(8):
            flipped = mask.clone()
            flipped[i, j] = ~flipped[i, j]
            rise = squared_error(weight, flipped, gram) - before
            assert float(costs[i, j]) == pytest.approx(rise, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("llama", "50%"), ("llama", "2:4"), ("opt", "50%"), ("falcon", "2:4"), ("mixtral", "2:4")],
)
def test_no_linear_of_a_model_gets_worse(name: str, pattern: str) -> None:
    program = Observe(gram=True)(zoo_program(name)).program
    steered = SteerScores(pattern=pattern)(program).program
    plain = masks_of(program, PruneWanda(pattern))
    moved = masks_of(steered, PruneWanda(pattern))
    fact = steered.fact(ScoreMultipliers)
    assert set(fact.linears) == set(plain)
    better = 0
    for linear in find_linears(program):
        if linear.name not in plain:
            continue
        edge = program.fact(Statistics).edges[linear.name]
        assert edge.gram is not None
        weight = linear.weight(program)
        before = squared_error(weight, plain[linear.name], edge.gram)
        after = squared_error(weight, moved[linear.name], edge.gram)
        steering = fact.linears[linear.name]
        assert (steering.error_before, steering.error_after) == pytest.approx((before, after))
        assert after <= before
        assert int(moved[linear.name].sum()) == int(plain[linear.name].sum())
        assert 0 <= steering.held_out < max(edge.count, 1)
        if after == before:
            assert torch.equal(moved[linear.name], plain[linear.name])
            assert bool((steering.multipliers == 1).all())
        better += after < before
    assert better > 0


@pytest.mark.parametrize("name", SMALL)
def test_it_is_deterministic_stage_by_stage(name: str) -> None:
    steps = [Observe(gram=True), SteerScores(pattern="2:4"), PruneWanda("2:4")]
    first, second = (masks_of(small_program(name), *steps) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_multipliers_of_one_leave_every_mask_as_it_is() -> None:
    program = Observe()(small_program("gpt2")).program
    ones = {n.name: Steering(torch.ones(n.in_features), 0.0, 0.0, 0) for n in find_linears(program)}
    steered = program.with_fact(ScoreMultipliers(ones))
    for step in (PruneWanda("2:4"), PruneMagnitude("50%"), PruneMagnitude("30% global")):
        plain, same = masks_of(program, step), masks_of(steered, step)
        assert all(torch.equal(plain[n], same[n]) for n in plain)


def test_any_pruner_multiplies_its_scores() -> None:
    program = small_program("mlp")
    factors = torch.linspace(0.1, 5, 16)
    fact = ScoreMultipliers({"up.weight": Steering(factors, 0.0, 0.0, 0)})
    found = masks_of(program.with_fact(fact), PruneMagnitude("2:4"))
    assert torch.equal(
        found["up.weight"], keep(program.weights["up.weight"].abs() * factors, "2:4")
    )
    assert torch.equal(found["down.weight"], keep(program.weights["down.weight"].abs(), "2:4"))


def test_magnitude_is_steered_towards_its_inputs() -> None:
    program = Observe(gram=True)(zoo_program("llama")).program
    fact = SteerScores("prune-magnitude", "50%")(program).program.fact(ScoreMultipliers)
    ratios = [s.error_after / s.error_before for s in fact.linears.values()]
    assert min(ratios) < 0.95


def test_batches_that_it_did_not_learn_from_judge() -> None:
    program = Observe(gram=True)(zoo_program("llama")).program
    with_judges = SteerScores(pattern="2:4")(program).program.fact(ScoreMultipliers)
    assert {s.held_out for s in with_judges.linears.values()} == {40}  # The last batch.
    alone = dataclasses.replace(program, calibration=program.calibration[:1])
    fact = SteerScores(pattern="2:4")(alone).program.fact(ScoreMultipliers)
    assert {s.held_out for s in fact.linears.values()} == {0}


def test_the_fact_is_checked_and_goes_with_the_statistics() -> None:
    program = small_program("mlp")
    wrong = ScoreMultipliers({"up.weight": Steering(torch.zeros(16), 0.0, 0.0, 0)})
    assert "not a positive number" in str(wrong.check(program))
    narrow = ScoreMultipliers({"up.weight": Steering(torch.ones(3), 0.0, 0.0, 0)})
    assert "3 multipliers" in str(narrow.check(program))
    steps = [Observe(gram=True), SteerScores(pattern="2:4"), PruneWanda("2:4"), ApplyMasks()]
    assert ScoreMultipliers not in PassManager(steps)(program).program.facts


def test_gram_matrices_are_asked_for() -> None:
    with pytest.raises(RequirementError, match="no Gram matrix") as caught:
        PassManager([Observe(), SteerScores(), PruneWanda()])(small_program("mlp"))
    assert "Observe(gram=True)" in str(caught.value.next_step)


def test_what_cannot_be_steered_is_refused() -> None:
    for pattern in ("block:4x4:0.5", "50% global"):
        with pytest.raises(PatternError, match="cannot be steered"):
            SteerScores(pattern=pattern)
    with pytest.raises(RecipeError, match="is not a pruner") as caught:
        PassManager([Observe(gram=True), SteerScores("observe")])(small_program("mlp"))
    assert "prune-wanda" in str(caught.value.next_step)
    with pytest.raises(RecipeError, match="rate=0"):
        SteerScores(rate=0)


def test_another_pruner_behind_it_is_warned_about() -> None:
    step = SteerScores(pattern="2:4")
    assert step.warning([PruneWanda("2:4")]) is None
    assert "comes next" in str(step.warning([PruneWanda("50%")]))
    assert "comes next" in str(step.warning([PruneMagnitude("2:4")]))
    assert "no pruner" in str(step.warning([ApplyMasks()]))
