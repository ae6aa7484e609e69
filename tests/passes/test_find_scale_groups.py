"""find-scale-groups: the pass around the analysis, whose own tests are in tests/ir."""

from __future__ import annotations

import dataclasses

import pytest

from tests.small import SMALL, small_program
from zeroskip.ir.facts import same_facts
from zeroskip.ir.linears import find_linears
from zeroskip.ir.printer import print_program
from zeroskip.ir.scale_groups import ScaleGroups, find_scale_groups
from zeroskip.ir.verify import check_facts, verify
from zeroskip.passes import ApplyMasks, FindScaleGroups, PassManager, PruneMagnitude


@pytest.mark.parametrize("name", SMALL)
def test_nothing_but_a_fact_is_added(name: str) -> None:
    program = small_program(name)
    result = FindScaleGroups()(program)
    assert result.drift is None
    text = print_program(result.program)
    assert text == print_program(program).rstrip("\n") + "\n  fact ScaleGroups\n"
    fact = result.program.fact(ScaleGroups)
    assert same_facts({ScaleGroups: fact}, {ScaleGroups: find_scale_groups(program)})
    verify(result.program)


def test_groups_are_the_same_when_weights_are_pruned() -> None:
    before = FindScaleGroups()(small_program("llama")).program.fact(ScaleGroups)
    steps = [PruneMagnitude("2:4"), ApplyMasks(), FindScaleGroups()]
    after = PassManager(steps)(small_program("llama")).program.fact(ScaleGroups)
    assert same_facts({ScaleGroups: before}, {ScaleGroups: after})


def test_a_part_has_the_groups_that_lie_in_it() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    fact = program.fact(ScaleGroups)
    mlp = [n.name for n in find_linears(program) if ".mlp." in n.name]
    part = fact.restrict(mlp)
    assert [name.split(".mlp.")[-1] for name in part.groups] == [
        "gate_proj.weight",
        "down_proj.weight",
    ]
    assert {refusal.linear for refusal in part.refusals} <= set(mlp)
    # One linear of a group is not the group.
    assert fact.restrict(mlp[:1]).groups == {}
    rest = fact.restrict({n.name for n in find_linears(program)} - set(mlp))
    merged = rest.merge(part)
    assert merged.groups.keys() == fact.groups.keys()
    assert set(merged.refusals) == set(fact.refusals)


def test_a_group_that_does_not_fit_is_found_by_the_verifier() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    fact = program.fact(ScaleGroups)
    name, group = next(iter(fact.groups.items()))
    first, *rest = group.members
    for changes, reason in (
        ({"parameter": "nothing"}, "which does not exist"),
        ({"channels": first.channels[:-1]}, "does not fit"),
    ):
        wrong = dataclasses.replace(first, **changes)  # type: ignore[arg-type]
        damaged = dataclasses.replace(group, members=(wrong, *rest))
        found = check_facts(program.with_fact(ScaleGroups({**fact.groups, name: damaged})))
        assert found is not None
        assert found[0] == "ScaleGroups"
        assert reason in found[1]
