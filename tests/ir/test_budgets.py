"""Budgets: the claim can be checked, cut and put together, and pruners obey it."""

from __future__ import annotations

import pytest

from tests.small import small_program
from zeroskip.ir.budgets import Budgets
from zeroskip.ir.facts import Masks
from zeroskip.passes import PruneMagnitude


def test_what_is_false_is_caught() -> None:
    program = small_program("mlp")
    assert Budgets({"up.weight": 0.25}).check(program) is None
    assert "none, which is not a linear" in str(Budgets({"none": 0.5}).check(program))
    assert "outside [0, 1)" in str(Budgets({"up.weight": 1.0}).check(program))


def test_parts_and_the_whole() -> None:
    whole = Budgets({"up.weight": 0.25, "down.weight": 0.75})
    part = whole.restrict(["up.weight"])
    assert part.sparsities == {"up.weight": 0.25}
    assert part.merge(Budgets({"down.weight": 0.75})) == whole


@pytest.mark.parametrize(("pattern", "comparison"), [("50%", "row"), ("50% matrix", "matrix")])
def test_pruners_obey(pattern: str, comparison: str) -> None:
    program = small_program("mlp").with_fact(Budgets({"up.weight": 0.25}))
    masks = PruneMagnitude(pattern)(program).program.fact(Masks).masks
    kept = {name: float(mask.keep().float().mean()) for name, mask in masks.items()}
    assert kept == {"up.weight": 0.75, "down.weight": 0.5}
    assert comparison == masks["up.weight"].pattern.comparison  # type: ignore[attr-defined]


def test_n_of_m_has_one_budget() -> None:
    program = small_program("mlp").with_fact(Budgets({"up.weight": 0.25}))
    mask = PruneMagnitude("2:4")(program).program.fact(Masks).masks["up.weight"]
    assert str(mask.pattern) == "2:4"
    assert float(mask.keep().float().mean()) == 0.5
