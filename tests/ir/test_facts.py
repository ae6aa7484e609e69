"""Facts are checked against the program, split by linear and put together again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch

from zeroskip.ir import facts, statistics
from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import (
    Fact,
    Lowered,
    Mask,
    Masks,
    QuantizedValues,
    Roles,
    SparseWeights,
    same_facts,
)
from zeroskip.ir.formats import Rounded, ValueFormat
from zeroskip.ir.linears import find_linears, masked_sources
from zeroskip.ir.patterns import NM, SparsityPattern, Unstructured
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, ScoreMultipliers, Statistics, Steering
from zeroskip.ir.weights import pack_bits

NAMES = ["up.weight", "mix.weight", "head.weight"]


def edge(width: int, value: float = 1.0) -> EdgeStatistics:
    ones = torch.full((width,), value, dtype=torch.float64)
    return EdgeStatistics(3, ones, ones, ones.float())


def mask(keep: torch.Tensor, pattern: SparsityPattern | None = None) -> Mask:
    shape = (keep.shape[0], keep.shape[1])
    return Mask(pack_bits(keep), shape, pattern or Unstructured(0.5), "planted")


def steering(width: int, value: float = 1.5) -> Steering:
    return Steering(torch.linspace(0.5, value, width), 2.0, 1.0, 4)


def half(program: Program, name: str) -> torch.Tensor:
    (linear,) = [n for n in find_linears(program) if n.name == name]
    return Unstructured(0.5).project(linear.weight(program).abs())


@pytest.fixture
def program(captured: Callable[[str], Program]) -> Program:
    return captured("mlp")


@pytest.fixture
def sparse(program: Program) -> Program:
    """The program with half of each weight behind a mask."""
    keeps = {name: half(program, name) for name in NAMES}
    return program.with_weights(masked_sources(program, keeps))


@pytest.fixture
def true_facts(sparse: Program) -> list[Fact]:
    masks = {name: mask(half(sparse, name)) for name in NAMES}
    return [
        Roles(frozenset({"up.weight"}), frozenset({"mix.weight"}), frozenset({"head.weight"})),
        Statistics({n.name: edge(n.in_features, i) for i, n in enumerate(find_linears(sparse))}),
        ScoreMultipliers({n.name: steering(n.in_features) for n in find_linears(sparse)}),
        Masks(masks),
        SparseWeights(masks),
        QuantizedValues({name: ValueFormat("float32") for name in NAMES}),
        Lowered({"up.weight": "aten::linear"}, {"mix.weight": "too small", "head.weight": "no"}),
    ]


def test_every_kind_of_fact_is_tested(true_facts: list[Fact]) -> None:
    kinds = {
        value
        for module in (facts, statistics)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Fact) and value is not Fact
    }
    assert {type(fact) for fact in true_facts} == kinds


def test_what_is_true_holds(sparse: Program, true_facts: list[Fact]) -> None:
    for fact in true_facts:
        assert fact.check(sparse) is None, fact


def test_facts_of_nothing_hold(program: Program, true_facts: list[Fact]) -> None:
    for fact in true_facts:
        assert type(fact)().check(program) is None


WIDE = torch.ones(27, 13, dtype=torch.bool)
FALSEHOODS: list[tuple[Fact, str]] = [
    (Roles(heads=frozenset({"none"})), "none, which is not a linear"),
    (Roles(routers=frozenset({"up"})), "up, which is not a linear"),
    (Roles(shared=frozenset({"norm.weight"})), "norm.weight, which is not a linear"),
    (Statistics({"none": edge(13)}), "none, which is not a linear"),
    (Statistics({"up.weight": edge(27)}), r"\(27,\) channels, the linear has 13"),
    (ScoreMultipliers({"none": steering(13)}), "none, which is not a linear"),
    (ScoreMultipliers({"up.weight": steering(27)}), "27 multipliers for up.weight, which has 13"),
    (ScoreMultipliers({"up.weight": steering(13, -1.0)}), "of up.weight is not a positive"),
    (ScoreMultipliers({"up.weight": steering(13, float("inf"))}), "of up.weight is not a positive"),
    (Masks({"none": mask(WIDE)}), "none is"),
    (Masks({"mix.weight": mask(WIDE)}), r"mask of mix.weight is \(27, 13\)"),
    (Masks({"up.weight": mask(WIDE)}), "breaks 0.5: keeps 13 of 13, allowed 7"),
    (Masks({"up.weight": mask(WIDE, NM(2, 4, "pad"))}), "breaks 2:4 pad: row 0, group 0"),
    (Masks({"up.weight": mask(~WIDE, NM(2, 4))}), "not a multiple of 4"),
    (SparseWeights({"none": mask(~WIDE)}), "none is said to be sparse"),
    (SparseWeights({"up.weight": mask(~WIDE)}), "non-zero weight outside its mask"),
    (SparseWeights({"mix.weight": mask(~WIDE)}), r"mask of mix.weight is \(27, 13\)"),
    (QuantizedValues({"none": ValueFormat("int8")}), "none is said to be rounded"),
    (QuantizedValues({"up.weight": ValueFormat("bfloat16")}), "that bfloat16 values cannot hold"),
    (QuantizedValues({"up.weight": ValueFormat("int8", torch.ones(27, 1))}), "int8 values cannot"),
    (Lowered({"none": "aten::linear"}), "none is said to be lowered"),
    (Lowered({"up.weight": "zeroskip::masked_linear"}), "is said to run as zeroskip::masked"),
]


@pytest.mark.parametrize(("fact", "reason"), FALSEHOODS, ids=lambda x: str(x)[:40])
def test_a_falsehood_is_caught(fact: Fact, reason: str, program: Program) -> None:
    found = fact.check(program)
    assert found is not None
    assert re.search(reason, found), found


def test_one_weight_outside_a_mask_is_caught(sparse: Program) -> None:
    keep = half(sparse, "up.weight")
    fact = SparseWeights({"up.weight": mask(keep)})
    assert fact.check(sparse) is None
    row, column = (~keep).nonzero()[0].tolist()
    for value in (1e-30, float("nan")):
        weight = sparse.weights["up.weight"].clone()
        weight[row, column] = value
        assert fact.check(sparse.with_weights({"up.weight": weight})) is not None


def test_a_mask_that_says_more_than_the_one_behind_the_weight(sparse: Program) -> None:
    """A weight held behind a mask is judged by that mask: one more pruned weight is a falsehood."""
    keep = half(sparse, "up.weight")
    row, column = keep.nonzero()[0].tolist()
    keep[row, column] = False
    assert SparseWeights({"up.weight": mask(keep)}).check(sparse) is not None


def test_rounded_weights_are_known_by_their_source_and_by_their_values(program: Program) -> None:
    form, other = ValueFormat("bfloat16"), ValueFormat("bfloat16")
    rounded = Rounded(program.weights.source("up.weight"), form)
    behind = program.with_weights({"up.weight": rounded})
    for fact in (QuantizedValues({"up.weight": form}), QuantizedValues({"up.weight": other})):
        assert fact.check(behind) is None
    stored = program.with_weights({"up.weight": rounded.load()})
    assert QuantizedValues({"up.weight": form}).check(stored) is None
    assert QuantizedValues({"up.weight": ValueFormat("float16")}).check(program) is not None


def test_parts_put_together_are_the_whole(true_facts: list[Fact]) -> None:
    for fact in true_facts:
        parts = [fact.restrict([name]) for name in NAMES]
        whole = type(fact)()
        for part in parts:
            whole = whole.merge(part)
        assert same_facts({type(fact): whole}, {type(fact): fact})
        assert same_facts({type(fact): fact.restrict(NAMES)}, {type(fact): fact})
        assert same_facts({type(fact): fact.restrict([])}, {type(fact): type(fact)()})
        assert not same_facts({type(fact): parts[0]}, {type(fact): fact})
        assert not same_facts({type(fact): parts[0]}, {type(fact): parts[1]})


def test_a_part_says_nothing_about_other_linears(sparse: Program, true_facts: list[Fact]) -> None:
    for fact in true_facts:
        assert fact.restrict(["up.weight"]).check(sparse) is None


def test_the_later_fact_wins() -> None:
    merged = Statistics({"a": edge(2, 1), "b": edge(2, 1)}).merge(Statistics({"b": edge(2, 5)}))
    assert merged.edges["a"].mean().tolist() == [1 / 3] * 2
    assert merged.edges["b"].mean().tolist() == [5 / 3] * 2
    lowered = Lowered(refusals={"a": "first"}).merge(Lowered(refusals={"a": "second"}))
    assert lowered.refusals == {"a": "second"}


def test_facts_are_compared_by_value() -> None:
    one, other = (Statistics({"a": edge(3)}) for _ in range(2))
    assert same_facts({Statistics: one}, {Statistics: other})
    for change in (
        dataclasses.replace(other.edges["a"], count=4),
        dataclasses.replace(other.edges["a"], gram=torch.ones(3, 3)),
        dataclasses.replace(other.edges["a"], abs_max=torch.ones(3).double()),
        edge(3, 2.0),
    ):
        assert not same_facts({Statistics: one}, {Statistics: Statistics({"a": change})})
    assert not same_facts({Statistics: one}, {})


def test_masks_are_compared_by_what_they_keep() -> None:
    keep = torch.ones(2, 4, dtype=torch.bool)
    assert mask(keep).same_as(mask(keep.clone()))
    assert not mask(keep).same_as(mask(~keep))
    assert not mask(keep).same_as(mask(keep, NM(2, 4)))
    assert not mask(keep).same_as(mask(keep.view(4, 2)))
    assert not mask(keep).same_as(None)
    assert torch.equal(mask(keep).keep(), keep)


def test_a_program_without_the_fact_says_what_to_do(program: Program) -> None:
    with pytest.raises(RequirementError, match=r"holds no Statistics[\s\S]*provides Statistics"):
        program.fact(Statistics)
    known = program.with_fact(Statistics())
    assert known.fact(Statistics) == known.facts[Statistics]
    assert Statistics not in program.facts
    assert Statistics not in known.without_facts([Statistics]).facts
    assert Roles in known.without_facts([Statistics]).facts


def test_roles_in_words(program: Program) -> None:
    roles = Roles(frozenset("h"), frozenset("r"), frozenset("s"))
    assert [roles.role(n) for n in "hrsx"] == [
        "output head",
        "expert router",
        "shared weight",
        None,
    ]
