"""Folds behind a squared ReLU, where one scale in front is its square behind, and of layer scales."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from zeroskip.ir.capture import capture
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.program import Program
from zeroskip.ir.scale_equations import raised
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import FindScaleGroups, FoldScales, InduceSparsity, Observe
from zeroskip.passes.base import measure_drift

SQUARES, GAINS = "up.weight -> down.weight", "gain -> down.weight"


class Squared(nn.Module):
    """An MLP with a squared ReLU, and a gain on what it adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.gain = nn.Parameter(torch.ones(16))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x + self.gain * self.down(self.up(x).relu().square()))
        return normed


@pytest.fixture(scope="module")
def program() -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Squared().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.3, 0.5)
        batches = [{"x": torch.randn(3, 7, 16)} for _ in range(4)]
    captured = dataclasses.replace(capture(model, batches[0]), calibration=tuple(batches))
    return Observe()(FindScaleGroups()(captured).program).program


def group(program: Program, name: str) -> ScaleGroup:
    return program.fact(ScaleGroups).groups[name]


def ratios(before: Program, after: Program) -> tuple[Tensor, Tensor]:
    """What rows of `up` and columns of `down` were multiplied by."""
    rows, columns = (
        after.weights[name].double() / before.weights[name].double()
        for name in ("up.weight", "down.weight")
    )
    return rows[:, 0], columns[0]


def test_exponents_are_one_and_two(program: Program) -> None:
    found = group(program, SQUARES)
    assert found.positive
    exponents = {m.parameter: set(m.exponents.tolist()) for m in found.members}
    assert exponents == {"up.weight": {-1}, "up.bias": {-1}, "down.weight": {2}}
    (consumer,) = found.consumers
    assert set(consumer.exponents.tolist()) == {2}
    assert not found.shifts


def test_powers_are_exact_for_powers_of_two() -> None:
    scales = torch.tensor([-2.0, 0.5, 8.0, 3.0, 7.0, -0.25]).double()
    exponents = torch.tensor([2, -4, -1, 1, 0, -2], dtype=torch.int8)
    assert raised(scales, exponents).tolist() == [4.0, 16.0, 0.125, 3.0, 1.0, 16.0]


def test_given_scales_are_squared_behind(program: Program) -> None:
    scales = torch.linspace(0.5, 2.0, 24).double()
    folded = FoldScales(scales={SQUARES: scales})(program).program
    rows, columns = ratios(program, folded)
    torch.testing.assert_close(rows, 1 / scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        columns / columns[0], (scales / scales[0]).square(), rtol=1e-6, atol=0
    )
    assert 0 < measure_drift(program, folded, program.example_inputs) < 1e-5
    # What goes into the second linear is divided by the squares, and statistics know it.
    known = program.fact(Statistics).edges["down.weight"].total_of_squares
    divided = folded.fact(Statistics).edges["down.weight"].total_of_squares
    torch.testing.assert_close(divided, known / scales.pow(4))
    back = FoldScales("unfold")(folded).program
    for name in program.weights:
        torch.testing.assert_close(back.weights[name], program.weights[name], rtol=2e-7, atol=0)


def test_powers_of_two_are_exact_to_the_bit(program: Program) -> None:
    folded = FoldScales("activation", power_of_two=True)(program).program
    assert SQUARES in folded.fact(FoldedScales).folds
    old, new = (each.run(program.example_inputs) for each in (program, folded))
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_activation_multiplies_weights_by_root_mean_squares(program: Program) -> None:
    folded = FoldScales("activation", limit=1e6)(program).program
    edge = program.fact(Statistics).edges["down.weight"]
    wanted = (edge.total_of_squares / edge.count).sqrt()
    columns = ratios(program, folded)[1]
    expected = wanted / wanted.log().mean().exp()
    torch.testing.assert_close(columns / columns[0], expected / expected[0], rtol=1e-5, atol=0)


def test_smoothquant_multiplies_weights_by_its_formula(program: Program) -> None:
    folded = FoldScales("smoothquant", limit=1e6)(program).program
    weights = program.weights["down.weight"].abs().amax(0).double()
    wanted = (program.fact(Statistics).edges["down.weight"].abs_max.double() / weights).sqrt()
    columns = ratios(program, folded)[1]
    torch.testing.assert_close(columns / columns[0], wanted / wanted[0], rtol=1e-5, atol=0)


def test_equalize_gives_both_sides_the_same_range(program: Program) -> None:
    folded = FoldScales("equalize", limit=1e6, include=("down",))(program).program
    up = torch.maximum(folded.weights["up.weight"].abs().amax(1), folded.weights["up.bias"].abs())
    # The group of the gain multiplied rows of the same weight.
    rows = folded.fact(FoldedScales).total(group(program, GAINS))
    down = (folded.weights["down.weight"] / rows[:, None].float()).abs().amax(0)
    ratio = up / down
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_wrong_exponents_are_found_on_the_spot(program: Program) -> None:
    """A group that says 1 against 1 is left as it was; the other is folded."""
    found = program.fact(ScaleGroups)
    members = tuple(
        dataclasses.replace(m, exponents=m.exponents.sign())
        for m in group(program, SQUARES).members
    )
    wrong = dataclasses.replace(group(program, SQUARES), members=members)
    claimed = program.with_fact(ScaleGroups({**found.groups, SQUARES: wrong}, found.refusals))
    scales = {SQUARES: torch.full((24,), 3.0), GAINS: torch.full((16,), 3.0)}
    folded = FoldScales(scales=scales)(claimed).program
    known = folded.fact(FoldedScales)
    assert "scales do not cancel" in known.refused[SQUARES]
    assert known.folds.keys() == {GAINS}
    assert torch.equal(folded.weights["up.weight"], program.weights["up.weight"])


def test_a_layer_scale_is_folded_into_the_rows_behind_which_it_stands(program: Program) -> None:
    found = group(program, GAINS)
    assert {m.parameter for m in found.members} == {"gain", "down.weight", "down.bias"}
    assert not found.consumers
    assert not found.positive
    # The whole gain goes into the linear.
    scales = program.weights["gain"].double()
    sign = {m.parameter: int(m.exponents[0]) for m in found.members}["gain"]
    folded = FoldScales(scales={GAINS: scales.pow(-sign)})(program).program
    torch.testing.assert_close(folded.weights["gain"], torch.ones(16))
    expected = program.weights["gain"][:, None] * program.weights["down.weight"]
    torch.testing.assert_close(folded.weights["down.weight"], expected)
    assert measure_drift(program, folded, program.example_inputs) < 1e-5


@pytest.mark.parametrize("options", [{}, {"literal": True}, {"init": "paper"}])
def test_scales_are_learned_through_squares(program: Program, options: dict[str, object]) -> None:
    step = InduceSparsity("50%", epochs=1, guard=False, **options)  # type: ignore[arg-type]
    induced = step(program).program
    assert SQUARES in induced.fact(FoldedScales).folds
    assert not induced.fact(FoldedScales).refused
    assert measure_drift(program, induced, program.example_inputs) < 1e-5
