"""apply-masks: zeros where the masks say so, and every other bit as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.small import SMALL, small_model, small_program
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import NM
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import ApplyMasks, Observe, Pass, PassManager, PruneMagnitude, PruneWanda


@pytest.mark.parametrize("name", SMALL)
def test_kept_weights_keep_every_bit_and_the_rest_is_zero(name: str) -> None:
    program = small_program(name)
    decided = PruneMagnitude("2:4")(program).program
    applied = ApplyMasks()(decided).program
    masks = decided.fact(Masks).masks
    assert applied.fact(SparseWeights).masks == masks
    touched = set()
    for linear in find_linears(program):
        before, after = linear.weight(program), linear.weight(applied)
        if linear.name not in masks:
            assert torch.equal(before, after), linear.name
            continue
        touched.add(linear.parameter)
        keep = masks[linear.name].keep()
        assert torch.equal(after[keep].view(torch.int32), before[keep].view(torch.int32))
        # All bits: a negative zero would be a different file.
        assert not after[~keep].view(torch.int32).any()
        assert before[~keep].any()
    for parameter in program.weights:
        if parameter not in touched:
            assert program.weights.source(parameter) is applied.weights.source(parameter)


def test_the_outputs_are_those_of_the_model_with_zeros() -> None:
    program = small_program("gpt2")
    applied = PassManager([PruneMagnitude("4:8"), ApplyMasks()])(program).program
    model = small_model("gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(applied.weights[name])
        expected = model(**program.example_inputs).logits
    torch.testing.assert_close(applied.run(program.example_inputs)["logits"], expected)


def test_infinite_weights_outside_the_mask_become_zero() -> None:
    program = small_program("mlp")
    decided = PruneMagnitude("2:4")(program).program
    keep = decided.fact(Masks).masks["up.weight"].keep()
    weight = program.weights["up.weight"].clone()
    weight[~keep] = float("inf")
    applied = ApplyMasks().run(decided.with_weights({"up.weight": weight}))
    assert torch.equal(applied.weights["up.weight"], torch.where(keep, weight, 0.0))


def test_one_expert_is_pruned_and_its_neighbours_are_not() -> None:
    program = small_program("moe")
    parameter = "model.layers.0.mlp.experts.down_proj"
    step = PruneMagnitude("2:4", include=(f"{parameter}[1]",))
    applied = PassManager([step, ApplyMasks()])(program).program
    before, after = program.weights[parameter], applied.weights[parameter]
    for expert in (0, 2, 3):
        assert torch.equal(before[expert], after[expert])
    assert int(after[1].count_nonzero()) == before[1].numel() // 2


def test_masks_can_be_applied_on_top_of_masks() -> None:
    program = small_program("mlp")
    steps: list[Pass] = [PruneMagnitude("4:8"), ApplyMasks(), PruneMagnitude("2:4"), ApplyMasks()]
    applied = PassManager(steps)(program).program
    masks = applied.fact(SparseWeights).masks
    for linear in find_linears(applied):
        weight = linear.weight(applied)
        assert str(masks[linear.name].pattern) == "2:4"
        original = linear.weight(program)
        inner = NM(4, 8).project(original.abs())
        outer = NM(2, 4).project(original.abs() * inner)
        assert torch.equal(weight, original * inner * outer)


def test_statistics_no_longer_hold() -> None:
    program = small_program("mlp")
    steps: list[Pass] = [Observe(), PruneWanda("2:4")]
    assert Statistics in PassManager(steps)(program).program.facts
    assert Statistics not in PassManager([*steps, ApplyMasks()])(program).program.facts


def test_masks_survive_a_copy_of_the_fact() -> None:
    decided = PruneMagnitude("2:4")(small_program("mlp")).program
    mask = decided.fact(Masks).masks["up.weight"]
    assert mask.same_as(copy.deepcopy(mask))
    assert not mask.same_as(None)


def test_masks_are_asked_for() -> None:
    with pytest.raises(CompileError, match="apply-masks needs Masks"):
        PassManager([ApplyMasks()])(small_program("mlp"))
