"""Sensitivity is the error that pruning one linear makes, and nothing is pruned."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.kept_traces import capture_once as capture
from tests.zoo import ZOO
from zeroskip.ir.errors import CalibrationError, CompileError, PatternError
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.passes.measure_sensitivity import measure_sensitivity


@pytest.fixture(scope="module")
def program() -> Program:
    entry = ZOO["mlp"]
    captured = capture(entry.model(), entry.inputs())
    return dataclasses.replace(captured, calibration=[entry.inputs(3, 20), entry.inputs(2, 11)])


def test_it_is_the_error_of_the_output(program: Program) -> None:
    patterns = [parse_pattern(text) for text in ("30%", "60%", "2:4")]
    found = measure_sensitivity(program, patterns)
    weight = program.weights["up.weight"]
    x = torch.cat([batch["features"].reshape(-1, 13) for batch in program.calibration])
    scores = weight.abs() * x.norm(dim=0)
    for pattern, error in zip(patterns[:2], found["up.weight"], strict=False):
        lost = weight.masked_fill(pattern.project(scores), 0)
        assert error == pytest.approx(float((x @ lost.T).norm() / (x @ weight.T).norm()), rel=1e-4)
    assert math.isnan(found["up.weight"][2])  # 13 inputs are no multiple of four.
    low, high, _ = found["mix.weight"]
    assert 0 < low < high < 1


def test_names_choose(program: Program) -> None:
    patterns = [parse_pattern("50%")]
    assert set(measure_sensitivity(program, patterns, include=("up",))) == {"up.weight"}
    assert "up.weight" not in measure_sensitivity(program, patterns, exclude=("up",))


def test_nothing_is_changed(program: Program) -> None:
    before = {name: program.weights[name].clone() for name in program.weights}
    facts = set(program.facts)
    measure_sensitivity(program, [parse_pattern("90%")])
    assert all(torch.equal(program.weights[name], kept) for name, kept in before.items())
    assert set(program.facts) == facts


def test_refusals(program: Program) -> None:
    with pytest.raises(CalibrationError, match="there is none"):
        measure_sensitivity(dataclasses.replace(program, calibration=()), [parse_pattern("50%")])
    with pytest.raises(PatternError, match="different rows"):
        measure_sensitivity(program, [parse_pattern("50% matrix")])
    with pytest.raises(CompileError, match="matches no linear"):
        measure_sensitivity(program, [parse_pattern("50%")], include=("nothing",))
