"""compensate-energy: the paper's equations, and a guard that judges by the outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kept_traces import capture_once as capture
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip.ir.errors import CalibrationError, CompileError, RecipeError, RequirementError
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.weight_energy import Compensated
from zeroskip.ir.weights import pack_bits
from zeroskip.passes import (
    ApplyMasks,
    CompensateEnergy,
    Observe,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    ShiftToBias,
)

ALWAYS = functools.partial(CompensateEnergy, guard=False)


def published(
    weight: Tensor, keep: Tensor, mode: str, clamp: tuple[float, float] = (0.5, 2.0)
) -> Tensor:
    """Column after column, then row after row, in float64 and as the equations are written."""
    weight = weight.double()
    pruned = weight * keep
    if mode in ("column", "both"):
        for j in range(weight.shape[1]):
            mean = weight[:, j].mean()
            wanted = ((weight[:, j] - mean) ** 2).sum()
            left = ((pruned[:, j] - mean) ** 2).sum()
            scale = (wanted / left).sqrt().clamp(*clamp)
            pruned[:, j] = ((pruned[:, j] - mean) * scale + mean) * keep[:, j]
    if mode in ("row", "both"):
        for i in range(weight.shape[0]):
            mean = weight[i].mean()
            wanted = ((weight[i] - mean) ** 2).sum()
            left = ((pruned[i] - mean) ** 2).sum()
            scale = (wanted / left).sqrt().clamp(*clamp)
            pruned[i] = ((pruned[i] - mean) * scale + mean) * keep[i]
    return pruned


def linears_of(program: Program) -> dict[str, Linear]:
    return {linear.name: linear for linear in find_linears(program)}


def program_of(weight: Tensor, keep: Tensor | None = None, pattern: str = "50%") -> Program:
    """A program of one linear, with a mask for it."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    inputs = torch.randn(6, columns, generator=torch.Generator().manual_seed(3)).to(weight)
    program = capture(nn.Sequential(layer).eval(), {"input": inputs[:2]})
    program = dataclasses.replace(program, calibration=({"input": inputs},))
    if keep is None:
        return PruneMagnitude(pattern)(program).program
    mask = Mask(pack_bits(keep), (rows, columns), parse_pattern("0% matrix"), "test")
    return program.with_fact(Masks({"0.weight": mask}))


def compensated(program: Program, *options: Any) -> Tensor:
    return ALWAYS(*options)(program).program.weights["0.weight"]


def drawn(rows: int, columns: int) -> Tensor:
    """Rows and columns with means and sizes of their own."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(columns, generator=generator) + 0.3
    return weight + 0.2 * torch.randn(rows, 1, generator=generator)


@pytest.mark.parametrize("mode", ["column", "row", "both"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "70% matrix"])
def test_weights_are_those_of_the_equations(mode: str, pattern: str) -> None:
    weight = drawn(24, 32)
    program = program_of(weight, pattern=pattern)
    keep = program.fact(Masks).masks["0.weight"].keep()
    found = compensated(program, mode)
    torch.testing.assert_close(found.double(), published(weight, keep, mode), rtol=1e-5, atol=1e-6)
    assert not found[~keep].any()
    assert not torch.signbit(found[~keep]).any()
    tight = compensated(program, mode, (0.99, 1.01))
    expected = published(weight, keep, mode, (0.99, 1.01))
    torch.testing.assert_close(tight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tight, found, rtol=1e-3)


def test_the_energy_is_the_old_one_before_the_mask_is_put_on_again() -> None:
    weight = drawn(24, 32)
    program = program_of(weight)
    keep = program.fact(Masks).masks["0.weight"].keep()
    mean = weight.double().mean(0)
    # What every kept weight of a column was scaled by, about the mean of all of them.
    scales = (compensated(program, "column", (0.01, 100.0)).double() - mean) / (weight - mean)
    scale = torch.stack([scales[keep[:, j], j].median() for j in range(32)])
    left = ((weight * keep).double() - mean).square().sum(0) * scale.square()
    torch.testing.assert_close(left, (weight.double() - mean).square().sum(0), rtol=1e-4, atol=0)


def test_means_are_those_before_pruning_and_columns_come_first() -> None:
    weight = drawn(24, 32) + 0.5
    program = program_of(weight)
    keep = program.fact(Masks).masks["0.weight"].keep()
    found = compensated(program, "both").double()
    mean = (weight * keep).double().mean(0)
    spread = ((weight * keep).double() - mean).square().sum(0)
    wrong = (weight.double() - mean) * ((weight - weight.mean(0)).square().sum(0) / spread).sqrt()
    assert not torch.allclose(compensated(program, "column").double(), (wrong + mean) * keep)
    rows_first = published(weight.T, keep.T, "both").T
    assert not torch.allclose(found, rows_first, rtol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_keeps_nothing_and_what_has_no_energy(transposed: bool) -> None:
    weight = drawn(24, 32)
    weight[:, 7] = 0.25  # All the same: nothing about its mean.
    weight[:, 11] = 0
    keep = torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, [7, 11]] = True
    keep[3], keep[:, 5] = False, False
    along = "column"
    if transposed:
        weight, keep, along = weight.T.contiguous(), keep.T.contiguous(), "row"
    program = program_of(weight, keep)
    result = ALWAYS()(program).program
    found = result.weights["0.weight"]
    assert torch.isfinite(found).all()
    assert not found[~keep].any()
    record = result.fact(Compensated).linears["0.weight"]
    assert 0.5 <= record.smallest < record.largest <= 2.0
    # One of the 24 is pruned, so the constant vector has lost something; what is kept of it stays.
    once = compensated(program, along)
    chosen = once[:, [7, 11]] if not transposed else once[[7, 11]].T
    expected = torch.tensor([0.25, 0.0]).repeat(24, 1)
    expected[3] = 0
    torch.testing.assert_close(chosen, expected)
    # Vectors that keep nothing have no scale to be recorded: here all would be at the limit.
    only = ALWAYS(along, (1.0, 1.0))(program).program.fact(Compensated).linears["0.weight"]
    assert (only.smallest, only.largest) == (1.0, 1.0)


def test_nothing_kept_at_all() -> None:
    weight = drawn(8, 8)
    program = program_of(weight, torch.zeros(8, 8, dtype=torch.bool))
    result = ALWAYS()(program).program
    assert not result.weights["0.weight"].any()
    record = result.fact(Compensated).linears["0.weight"]
    assert (record.smallest, record.largest) == (1.0, 1.0)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1)])
def test_single_rows_and_columns(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    keep = (torch.arange(16) % 2 == 0).view(shape)
    across = "column" if shape[0] == 1 else "row"
    program = program_of(weight, keep)
    # A vector of one entry is its own mean: it has no energy to lose.
    found = compensated(program, across)
    torch.testing.assert_close(found, weight * keep)
    along = "row" if shape[0] == 1 else "column"
    expected = published(weight, keep, along)
    torch.testing.assert_close(compensated(program, along).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_rounded_once(dtype: torch.dtype) -> None:
    weight = drawn(24, 32).to(dtype)
    program = program_of(weight)
    keep = program.fact(Masks).masks["0.weight"].keep()
    found = compensated(program)
    assert found.dtype == dtype
    # A unit of the last place: rounding twice, or computing in the type, costs more.
    unit = max(torch.finfo(dtype).eps, 1e-13)
    expected = published(weight, keep, "both")
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * unit + 1e-6, atol=1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_overflow_is_refused() -> None:
    weight = drawn(8, 16).to(torch.float16)
    weight[:, 0] = 60000 * weight[:, 0].sign()
    keep = torch.zeros(8, 16, dtype=torch.bool)
    keep[0] = True
    with pytest.raises(CompileError, match=r"not finite in torch\.float16") as caught:
        ALWAYS("column")(program_of(weight, keep))
    assert caught.value.where == "0.weight"
    assert caught.value.pass_name == "compensate-energy"
    assert caught.value.next_step


def test_the_same_with_one_thread_and_with_two() -> None:
    program = program_of(drawn(512, 384))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        try:
            found.append(compensated(program))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_transposed_weights_and_experts(name: str) -> None:
    program = small_program(name)
    step = PruneMagnitude("2:4")
    if name == "moe":
        step = PruneMagnitude("2:4", include=("*experts*",), exclude=("*gate_up_proj[[]1]",))
    decided = step(program).program
    result = ALWAYS()(decided).program
    masks = decided.fact(Masks).masks
    assert set(result.fact(SparseWeights).masks) == set(masks)
    before, after = linears_of(decided), linears_of(result)
    for linear, mask in masks.items():
        expected = published(before[linear].weight(decided), mask.keep(), "both")
        found = after[linear].weight(result)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for linear, view in before.items():
        if linear not in masks:
            assert torch.equal(after[linear].weight(result), view.weight(decided)), linear
    if name == "moe":
        assert any(n.endswith("gate_up_proj[1]") and n not in masks for n in before)


# The guard.


def output_loss(dense: Program, candidate: Program, batch: Any) -> float:
    """KL(dense || candidate) for logits, else the relative squared error, over all that is a token."""
    (wanted,), (found,) = dense.run(batch).values(), candidate.run(batch).values()
    wanted, found = wanted.double(), found.double()
    if "attention_mask" in batch:
        tokens = batch["attention_mask"].bool()
        p, q = wanted[tokens].log_softmax(-1), found[tokens].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp", "convnet"])
def test_the_guard_takes_what_the_outputs_like_best(name: str) -> None:
    dense = small_program(name)
    decided = PruneMagnitude("50%")(dense).program
    candidates = {"none": ApplyMasks()(decided).program}
    for mode in ("column", "row", "both"):
        candidates[mode] = ALWAYS(mode)(decided).program
    losses = {
        mode: sum(output_loss(dense, program, batch) for batch in dense.calibration) / 2
        for mode, program in candidates.items()
    }
    guarded = CompensateEnergy()(decided).program
    fact = guarded.fact(Compensated)
    assert list(fact.losses) == ["none", "column", "row", "both"]
    assert fact.losses == pytest.approx(losses, rel=1e-3)
    assert fact.batches == 2
    best = min(losses, key=losses.__getitem__)
    assert {found.mode for found in fact.linears.values()} == {best}
    for parameter in guarded.weights:
        assert torch.equal(guarded.weights[parameter], candidates[best].weights[parameter])
    one = CompensateEnergy("row", held_out=1)(decided).program.fact(Compensated)
    assert one.batches == 1
    assert list(one.losses) == ["none", "row"]
    last = dense.calibration[-1]
    expected = [output_loss(dense, candidates[mode], last) for mode in one.losses]
    assert list(one.losses.values()) == pytest.approx(expected, rel=1e-3)


def test_padding_does_not_judge() -> None:
    program = PruneMagnitude("50%")(small_program("llama")).program
    found = CompensateEnergy()(program).program.fact(Compensated).losses
    changed = [{k: v.clone() for k, v in batch.items()} for batch in program.calibration]
    assert any(bool((batch["attention_mask"] == 0).any()) for batch in changed)
    for batch in changed:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    other = CompensateEnergy()(dataclasses.replace(program, calibration=changed)).program
    assert other.fact(Compensated).losses == pytest.approx(found, rel=1e-4)


def test_a_correction_that_harms_is_not_made() -> None:
    # What is pruned meets inputs that are zero: the masks cost nothing, and more energy does.
    weight = drawn(24, 32)
    keep = (torch.arange(32) % 2 == 0).expand(24, 32)
    program = program_of(weight, keep)
    inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * keep[0]
    program = dataclasses.replace(program, calibration=({"input": inputs},))
    result = CompensateEnergy()(program).program
    fact = result.fact(Compensated)
    assert fact.linears["0.weight"].mode == "none"
    assert fact.losses["none"] < 1e-12 < min(fact.losses["row"], fact.losses["both"])
    assert torch.equal(result.weights["0.weight"], weight * keep)
    forced = ALWAYS("row")(program).program
    assert output_loss(program, forced, {"input": inputs}) > 1e-3


def test_a_correction_that_helps_is_made() -> None:
    # Each input points along some of the rows, so that pruning shortens the outputs.
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) @ weight
    program = program_of(weight, pattern="50%")
    program = dataclasses.replace(program, calibration=({"input": inputs},))
    fact = CompensateEnergy()(program).program.fact(Compensated)
    assert fact.linears["0.weight"].mode != "none"
    assert min(fact.losses.values()) < 0.8 * fact.losses["none"]


def test_losses_that_are_no_numbers_never_win() -> None:
    program = small_program("mlp")
    huge = {"down.weight": program.weights["down.weight"] * 1e38}
    decided = PruneMagnitude("50%", include=("up",))(program.with_weights(huge)).program
    fact = CompensateEnergy()(decided).program.fact(Compensated)
    assert set(fact.losses.values()) == {math.inf}
    assert {found.mode for found in fact.linears.values()} == {"none"}


def zoo_program() -> Program:
    entry = ZOO["llama"]
    batches = (entry.inputs(2, 33), entry.inputs(3, 20, padded=True))
    return dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)


def masks_of_layer(program: Program, layer: int) -> dict[str, Tensor]:
    masks = program.fact(Masks).masks
    return {n: m.keep() for n, m in masks.items() if f"layers.{layer}." in n}


def test_without_the_guard_later_layers_are_pruned_for_what_earlier_ones_give() -> None:
    program = zoo_program()
    result = PassManager([Observe(), PruneWanda("50%"), ALWAYS()])(program)
    assert result.records[-1].stages > 1
    found = result.program
    first = {n: found.weights[n] for n in found.weights if ".layers.0." in n}
    # The second layer as it was, behind the first one as it became.
    behind = PruneWanda("50%")(Observe()(program.with_weights(first)).program).program
    expected = masks_of_layer(behind, 1)
    assert len(expected) == 7
    for name, keep in masks_of_layer(found, 1).items():
        assert torch.equal(keep, expected[name]), name
    dense = masks_of_layer(PruneWanda("50%")(Observe()(program).program).program, 1)
    assert any(not torch.equal(dense[name], expected[name]) for name in dense)
    assert not found.fact(Compensated).losses
    assert len(found.fact(Compensated).linears) == 14


def test_with_the_guard_the_pass_sees_all_layers_at_once() -> None:
    program = zoo_program()
    result = PassManager([Observe(), PruneWanda("50%"), CompensateEnergy()])(program)
    assert result.records[-1].stages == 1
    dense = PruneWanda("50%")(Observe()(program).program).program
    for layer in (0, 1):
        found = masks_of_layer(result.program, layer)
        for name, keep in masks_of_layer(dense, layer).items():
            assert torch.equal(keep, found[name]), name
    assert len({c.mode for c in result.program.fact(Compensated).linears.values()}) == 1


# Its place.


@pytest.mark.parametrize("guard", [True, False])
def test_masks_that_were_applied_are_refused(guard: bool) -> None:
    steps = [PruneMagnitude("2:4"), ApplyMasks(), CompensateEnergy(guard=guard)]
    with pytest.raises(CompileError, match="applied already") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.pass_name == "compensate-energy"
    assert "between the pruner and apply-masks" in str(caught.value.next_step)
    with pytest.raises(RequirementError, match="Masks"):
        PassManager([CompensateEnergy(guard=guard)])(small_program("mlp"))


def test_apply_masks_has_nothing_left_to_do() -> None:
    steps = [PruneMagnitude("2:4"), ALWAYS()]
    alone = PassManager(steps)(small_program("mlp")).program
    result = ApplyMasks()(alone)
    assert result.drift is None
    for name in alone.weights:
        assert torch.equal(alone.weights[name], result.program.weights[name])


def test_a_second_mask_is_compensated_for_what_it_takes_itself() -> None:
    first = PassManager([PruneMagnitude("4:8"), ALWAYS()])(small_program("gpt2")).program
    decided = PruneMagnitude("2:8")(first).program
    second = ALWAYS()(decided).program
    views = linears_of(first)
    for name, mask in decided.fact(Masks).masks.items():
        expected = published(views[name].weight(first), mask.keep(), "both")
        found = views[name].weight(second)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_dropped() -> None:
    steps = [Observe(), PruneWanda("2:4"), ALWAYS()]
    for result in (
        PassManager(steps)(small_program("mlp")).program,
        PassManager([*steps[:2], CompensateEnergy()])(small_program("mlp")).program,
    ):
        assert Statistics not in result.facts


def test_shifted_biases_stay_and_are_judged_with_the_rest() -> None:
    program = small_program("gpt2")
    shifted = PassManager([Observe(), PruneWanda("2:4"), ShiftToBias()])(program).program
    result = CompensateEnergy()(shifted).program
    plain = ApplyMasks()(shifted).program
    expected = sum(output_loss(program, plain, batch) for batch in program.calibration) / 2
    assert result.fact(Compensated).losses["none"] == pytest.approx(expected, rel=1e-3)
    for name in program.weights:
        if name.endswith("bias"):
            assert torch.equal(result.weights[name], shifted.weights[name])


def test_the_guard_asks_for_calibration_data() -> None:
    program = dataclasses.replace(small_program("mlp"), calibration=())
    steps = [PruneMagnitude("2:4"), CompensateEnergy()]
    with pytest.raises(CalibrationError, match="no calibration data to judge on") as caught:
        PassManager(steps)(program)
    assert "guard=False" in str(caught.value.next_step)
    result = PassManager([PruneMagnitude("2:4"), ALWAYS()])(program).program
    assert result.fact(Compensated).linears


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "none"},
        {"clamp": (0.0, 2.0)},
        {"clamp": (1.5, 2.0)},
        {"clamp": (0.5, float("inf"))},
        {"clamp": (0.5,)},
        {"held_out": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="out of range") as caught:
        CompensateEnergy(**options)
    assert caught.value.pass_name == "compensate-energy"
    assert caught.value.next_step


def test_the_fact_is_checked() -> None:
    result = ALWAYS()(program_of(drawn(8, 8))).program
    fact = result.fact(Compensated)
    assert fact.check(result) is None
    record = fact.linears["0.weight"]
    broken = dataclasses.replace(record, smallest=float("nan"))
    assert "scales of" in str(Compensated({"0.weight": broken}).check(result))
    assert "other is said" in str(Compensated({"other": record}).check(result))
    assert not fact.restrict(()).linears
    judged = Compensated({}, {"none": 1.0}, 3)
    assert judged.merge(fact).losses == {"none": 1.0}
    assert judged.merge(fact).linears == fact.linears
