"""shift-to-bias: the mean of the residual is zero, and the module, the file and the reload have it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.small import SMALL, small_program
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.added_parameters import added_parameters
from zeroskip.ir.biases import ShiftedBiases, find_bias
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.observers import row_mask
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.passes import (
    ApplyMasks,
    ExportOnnx,
    LowerSparseLinear,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    ShiftToBias,
)

PRUNE: tuple[Pass, ...] = (Observe(), PruneWanda("2:4"))
ALL: tuple[Pass, ...] = (*PRUNE, ShiftToBias(add=True), ApplyMasks())


def linears_of(program: Program) -> dict[str, Linear]:
    return {linear.name: linear for linear in find_linears(program)}


def inputs_of(program: Program, linear: Linear) -> Tensor:
    """What enters a linear over the calibration data, padding left out, float64 [tokens, in]."""
    tapped = program.fork()
    nodes = {node.name: node for node in tapped.graph.nodes}
    rows = []
    for use in linear.uses:
        activation = nodes[use.activation.name]
        with tapped.graph.inserting_before(nodes[use.node.name]):
            mask = row_mask(tapped, activation)
        wanted = [activation] if mask is None else [activation, mask]
        tapped.graph.output_node().args = (tuple(wanted),)
        tapped.graph_module.recompile()
        names = ("x", "mask")[: len(wanted)]
        for batch in program.calibration:
            given = {name: batch[name] for name in program.inputs}
            found = dataclasses.replace(tapped, outputs=names).run(given)
            x = found["x"].double().flatten(0, -2)
            rows.append(x[found["mask"].flatten().bool()] if "mask" in found else x)
    return torch.cat(rows)


def residuals(program: Program, name: str) -> tuple[Tensor, Tensor]:
    """W x - (W * M) x, and the same minus what was added to the bias, for every token."""
    linear = linears_of(program)[name]
    lost = linear.weight(program).masked_fill(program.fact(Masks).masks[name].keep(), 0).double()
    plain = inputs_of(program, linear) @ lost.T
    return plain, plain - program.fact(ShiftedBiases).shifts[name].shift


@pytest.mark.parametrize("name", SMALL)
def test_the_mean_of_the_residual_is_zero_and_its_square_no_larger(name: str) -> None:
    # The residual is that of the inputs that were observed: before anything is shifted.
    decided = PassManager(PRUNE)(small_program(name)).program
    shifted = ShiftToBias(add=True)(decided).program
    shifts = shifted.fact(ShiftedBiases).shifts
    assert shifts
    known = decided.with_fact(shifted.fact(ShiftedBiases))
    for linear in shifts:
        before, after = residuals(known, linear)
        assert before.mean(0).norm() > 1e-4 * before.norm() / len(before) ** 0.5
        scale = before.abs().max()
        assert after.mean(0).abs().max() < 1e-6 * scale, linear
        assert bool((after.square().mean(0) <= before.square().mean(0) + 1e-9 * scale**2).all())
        drop = before.square().mean(0) - after.square().mean(0)
        torch.testing.assert_close(drop, before.mean(0).square(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_biases_rise_by_the_shift_and_nothing_else_changes(name: str) -> None:
    decided = PassManager(PRUNE)(small_program(name)).program
    shifted = ShiftToBias(add=True)(decided).program
    assert shifted.facts[Masks] is decided.facts[Masks]
    seen = set()
    for linear, shift in shifted.fact(ShiftedBiases).shifts.items():
        for bias in shift.biases:
            old = torch.zeros(len(shift.shift), dtype=torch.float64)
            if not shift.added:
                old = decided.weights[bias].double()
            assert torch.equal(shifted.weights[bias], (old + shift.shift).float()), linear
            seen.add(bias)
    for parameter in decided.weights:
        if parameter not in seen:
            assert shifted.weights.source(parameter) is decided.weights.source(parameter)
    assert set(shifted.weights) - set(decided.weights) == seen - set(decided.weights)
    sparse = ApplyMasks()(shifted).program
    for linear_name, mask in sparse.fact(SparseWeights).masks.items():
        weight = linears_of(sparse)[linear_name].weight(sparse)
        dense = linears_of(decided)[linear_name].weight(decided)
        assert torch.equal(weight, dense.masked_fill(~mask.keep(), 0))


def test_a_bias_is_added_only_when_asked_for() -> None:
    program = PassManager([*PRUNE, ShiftToBias()])(small_program("llama")).program
    fact = program.fact(ShiftedBiases)
    assert not fact.shifts
    assert len(fact.refusals) == 7
    assert set(fact.refusals.values()) == {"it has no bias, and add is off"}
    assert set(program.weights) == set(small_program("llama").weights)


def test_tied_weights_with_biases_of_their_own(golden: Callable[[str], None]) -> None:
    program = PassManager([*PRUNE, ShiftToBias(add=True)])(small_program("mlp")).program
    golden(print_program(program))
    shifts = program.fact(ShiftedBiases).shifts
    assert shifts["up.weight"].biases == ("up.bias", "again.bias")
    assert not shifts["up.weight"].added
    # One module that is used twice gets one bias.
    assert shifts["down.weight"].biases == ("down.bias",)
    assert shifts["down.weight"].added


def test_experts_and_routers_are_left_alone() -> None:
    program = PassManager([*PRUNE, ShiftToBias(add=True)])(small_program("moe")).program
    fact = program.fact(ShiftedBiases)
    assert len(fact.shifts) == 4
    assert len(fact.refusals) == 8
    assert {r.split(",")[0] for r in fact.refusals.values()} == {"its weight is 3-D"}
    steps = (Observe(include=("*gate*",)), PruneMagnitude("2:4", include=("*mlp.gate.*",)))
    routed = PassManager([*steps, ShiftToBias(add=True)])(small_program("moe")).program
    (reason,) = routed.fact(ShiftedBiases).refusals.values()
    assert "has no place for one" in reason


class Spelled(nn.Module):
    """A bias behind a matmul, one that two linears share, one that is computed, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right.bias = self.left.bias
        self.last = nn.Linear(16, 4)
        self.bare = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.relu() @ self.first + self.bias
        hidden = self.left(hidden).relu() + self.right(hidden)
        hidden = nn.functional.linear(hidden, self.last.weight, self.last.bias * 2)
        return hidden.relu() @ self.bare


def test_every_spelling_of_a_bias() -> None:
    torch.manual_seed(0)
    x = {"x": torch.randn(5, 8)}
    model = Spelled().eval()
    program = dataclasses.replace(capture(model, x), calibration=(x,))
    shifted = PassManager([*PRUNE, ShiftToBias(add=True)])(program).program
    fact = shifted.fact(ShiftedBiases)
    assert fact.shifts["first"].biases == ("bias",)
    assert "is read by" in fact.refusals["left.weight"]
    assert "is read by" in fact.refusals["right.weight"]
    assert fact.refusals["last.weight"] == "what it adds is not a parameter of its own"
    # No module holds the matrix as its weight: only the program could have the bias.
    assert "has no place for one" in fact.refusals["bare"]
    assert not added_parameters(shifted)


def test_a_mask_chosen_anew_takes_the_place_of_the_first() -> None:
    program = PassManager([Observe(), PruneWanda("4:8"), ShiftToBias()])(
        small_program("gpt2")
    ).program
    again = PassManager([PruneWanda("2:4"), ShiftToBias()])(program).program
    once = PassManager([*PRUNE, ShiftToBias()])(small_program("gpt2")).program
    for shift in once.fact(ShiftedBiases).shifts.values():
        (bias,) = shift.biases
        torch.testing.assert_close(again.weights[bias], once.weights[bias])


def test_a_second_mask_on_top_of_an_applied_one_adds_its_own_shift() -> None:
    first = PassManager([Observe(), PruneWanda("4:8"), ShiftToBias(), ApplyMasks()])(
        small_program("gpt2")
    ).program
    decided = PassManager(PRUNE)(first).program
    second = ShiftToBias()(decided).program
    for name, shift in second.fact(ShiftedBiases).shifts.items():
        assert shift.shift.abs().max() > 0
        (bias,) = shift.biases
        expected = (first.weights[bias].double() + shift.shift).float()
        assert torch.equal(second.weights[bias], expected), name


def test_bfloat16_is_rounded_once_and_never_worse() -> None:
    entry = ZOO["opt"]
    batches = [entry.inputs(2, 33), entry.inputs(3, 20, padded=True)]
    model = entry.model(dtype=torch.bfloat16)
    program = dataclasses.replace(capture(model, entry.inputs()), calibration=batches)
    # One part: the biases of a layer are then looked at on the inputs that were observed.
    decided = PruneWanda("2:4")(Observe()(program).program).program
    shifted = ShiftToBias()(decided).program
    assert len(shifted.fact(ShiftedBiases).shifts) > 5
    for shift in shifted.fact(ShiftedBiases).shifts.values():
        (bias,) = shift.biases
        old, new = decided.weights[bias].double(), shifted.weights[bias]
        assert torch.equal(new, (old + shift.shift).to(torch.bfloat16))
        left = (shift.shift - (new.double() - old)).abs()
        assert bool((left <= shift.shift.abs()).all())


def test_padding_does_not_count() -> None:
    program = small_program("gpt2")
    steps = [*PRUNE, ShiftToBias()]
    found = PassManager(steps)(program).program.fact(ShiftedBiases).shifts
    changed = [{k: v.clone() for k, v in batch.items()} for batch in program.calibration]
    for batch in changed:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    other = PassManager(steps)(dataclasses.replace(program, calibration=changed)).program
    assert any(bool((b["attention_mask"] == 0).any()) for b in changed)
    for name, shift in other.fact(ShiftedBiases).shifts.items():
        torch.testing.assert_close(shift.shift, found[name].shift)


def test_masks_that_were_applied_are_refused() -> None:
    with pytest.raises(CompileError, match="applied already") as caught:
        PassManager([*PRUNE, ApplyMasks(), Observe(), ShiftToBias()])(small_program("gpt2"))
    assert caught.value.pass_name == "shift-to-bias"
    assert "between the pruner and apply-masks" in str(caught.value.next_step)
    with pytest.raises(RequirementError, match="Statistics"):
        PassManager([*PRUNE, ApplyMasks(), ShiftToBias()])(small_program("gpt2"))


def test_a_linear_without_statistics_is_refused() -> None:
    steps = [Observe(exclude=("up",)), PruneMagnitude("2:4"), ShiftToBias()]
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.where == "up.weight"


def test_a_bias_that_would_overflow_is_left_alone() -> None:
    program = small_program("mlp")
    decided = PassManager(PRUNE)(program).program
    high = {"up.bias": torch.full((24,), 3e38), "up.weight": torch.full((24, 16), 3e38)}
    found = ShiftToBias(include=("up",))(decided.with_weights(high)).program
    assert "overflow" in found.fact(ShiftedBiases).refusals["up.weight"]
    assert torch.equal(found.weights["up.bias"], high["up.bias"])


def same_outputs(model: nn.Module, compiled: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(compiled(**inputs)["logits"], expected, rtol=1e-4, atol=1e-4)


def test_a_llama_end_to_end(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model: Any = entry.model()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [entry.inputs(2, 33), entry.inputs(3, 20, padded=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = compile_sparse(model, ALL, calibration=batches)
    layers = model.config.num_hidden_layers
    added = [name for name, _ in model.named_parameters() if name not in dense]
    assert len(added) == 7 * layers
    assert all(
        p.dtype == torch.float32 and p.abs().sum() > 0 for p in map(model.get_parameter, added)
    )
    inputs = entry.inputs(3, 17, padded=True)
    same_outputs(model, compiled, inputs)
    tokens = model.generate(inputs["input_ids"][1:], max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 17
    # Biases are what it computes with, not only what it holds.
    with torch.no_grad():
        shifted = model(**inputs).logits
        for name in added:
            model.get_parameter(name).zero_()
        assert (model(**inputs).logits - shifted).abs().max() > 1e-3
        for name in added:
            model.get_parameter(name).copy_(compiled.program.weights[name])
    compiled.save_pretrained(tmp_path / "saved")
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, True)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, compiled.program.weights[name]), name
    same_outputs(again, compiled, inputs)


def test_a_checkpoint_on_disk_end_to_end(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model: Any = entry.model()
    model.save_pretrained(tmp_path / "dense")
    batches = [entry.inputs(2, 33)]
    live = compile_sparse(model, ALL, calibration=batches)
    onnx = ExportOnnx(tmp_path / "onnx")
    stored = compile_sparse(tmp_path / "dense", [*ALL, onnx], calibration=batches)
    # The export has compared prefill, cached steps and padding with the program.
    assert (tmp_path / "onnx" / "zeroskip_parity.json").is_file()
    stored.save_pretrained(tmp_path / "sparse")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    same_outputs(again, live, entry.inputs(2, 9))


def test_opt_has_biases_and_reloads_as_it_is(tmp_path: Path) -> None:
    entry = ZOO["opt"]
    model: Any = entry.model()
    names = {name for name, _ in model.named_parameters()}
    compiled = compile_sparse(
        model, [*PRUNE, ShiftToBias(), ApplyMasks()], calibration=[entry.inputs(2, 33)]
    )
    assert compiled.program.fact(ShiftedBiases).shifts
    assert {name for name, _ in model.named_parameters()} == names
    compiled.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, compiled.program.weights[name]), name
    same_outputs(again, compiled, entry.inputs(2, 9))


def test_a_configuration_without_the_option_is_warned_about(tmp_path: Path) -> None:
    entry = ZOO["mistral"]
    model: Any = entry.model()
    with pytest.warns(UserWarning, match="from_pretrained will ignore them"):
        compiled = compile_sparse(model, ALL, calibration=[entry.inputs(2, 33)])
    same_outputs(model, compiled, entry.inputs(2, 9))
    compiled.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any("proj.bias" in name for name, _ in again.named_parameters())


def test_falcon_adds_behind_its_product() -> None:
    entry = ZOO["falcon"]
    model: Any = entry.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = compile_sparse(model, ALL, calibration=[entry.inputs(2, 33)])
    fact = compiled.program.fact(ShiftedBiases)
    assert fact.shifts
    for name in fact.shifts:
        linear = linears_of(compiled.program)[name]
        assert find_bias(linear.uses[0], compiled.program) in fact.shifts[name].biases
    same_outputs(model, compiled, entry.inputs(2, 9))


def test_lowering_keeps_added_biases() -> None:
    entry = ZOO["llama"]
    model: Any = entry.model()
    steps = [*ALL, LowerSparseLinear(choose="always")]
    compiled = compile_sparse(model, steps, calibration=[entry.inputs(2, 33)])
    assert any("sparse_linear" in str(n.target) for n in compiled.program.graph.nodes)
    same_outputs(model, compiled, entry.inputs(2, 9))


class Stubborn(nn.Linear):
    """Computes without its bias as soon as it is a part of this model, and with it on its own."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if hasattr(self, "owned") else self.bias
        return nn.functional.linear(input, self.weight, bias)


def test_a_module_that_ignores_its_bias_is_found_out() -> None:
    model = nn.Sequential(Stubborn(8, 8, bias=False), nn.ReLU(), Stubborn(8, 8, bias=False)).eval()
    for layer in (model[0], model[2]):
        layer.owned = True  # type: ignore[union-attr]
    x = torch.randn(6, 8)
    weight = model[0].weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="does not add a bias"):
        compile_sparse(model, ALL, example_inputs={"input": x}, calibration=[{"input": x}])
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "2.weight"]
    assert torch.equal(model[0].weight, weight)  # type: ignore[arg-type]
