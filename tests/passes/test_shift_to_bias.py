"""shift-to-bias: no part of the data loses by it, and the module, the file and the reload have it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
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
from zeroskip.ir.errors import CalibrationError, CompileError, RecipeError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.observers import row_mask
from zeroskip.ir.patterns import parse_pattern
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
    PruneSparseGPT,
    PruneWanda,
    ShiftToBias,
)
from zeroskip.passes.shift_to_bias import what_all_agree_on

PRUNE: tuple[Pass, ...] = (Observe(), PruneWanda("2:4"))
ALL: tuple[Pass, ...] = (*PRUNE, ShiftToBias(add=True), ApplyMasks())


def linears_of(program: Program) -> dict[str, Linear]:
    return {linear.name: linear for linear in find_linears(program)}


def inputs_of(program: Program, linear: Linear) -> list[Tensor]:
    """What enters a linear, batch by batch, padding left out, float64 [tokens, in]."""
    tapped = program.fork()
    nodes = {node.name: node for node in tapped.graph.nodes}
    rows: list[list[Tensor]] = [[] for _ in program.calibration]
    for use in linear.uses:
        activation = nodes[use.activation.name]
        with tapped.graph.inserting_before(nodes[use.node.name]):
            mask = row_mask(tapped, activation)
        wanted = [activation] if mask is None else [activation, mask]
        tapped.graph.output_node().args = (tuple(wanted),)
        tapped.graph_module.recompile()
        names = ("x", "mask")[: len(wanted)]
        for number, batch in enumerate(program.calibration):
            given = {name: batch[name] for name in program.inputs}
            found = dataclasses.replace(tapped, outputs=names).run(given)
            x = found["x"].double().flatten(0, -2)
            rows[number].append(x[found["mask"].flatten().bool()] if "mask" in found else x)
    return [torch.cat(parts) for parts in rows]


def lost_by(program: Program, name: str) -> list[Tensor]:
    """W x - (W * M) x of every token, batch by batch, float64 [tokens, out]."""
    linear = linears_of(program)[name]
    lost = linear.weight(program).masked_fill(program.fact(Masks).masks[name].keep(), 0).double()
    return [x @ lost.T for x in inputs_of(program, linear)]


def weights_of(program: Program, name: str) -> list[Tensor]:
    """What each token counts: less than one where it is larger than half of its batch."""
    found = []
    for rows in inputs_of(program, linears_of(program)[name]):
        sizes = [float(row.norm()) ** 2 for row in rows]
        middle = sorted(sizes)[(len(sizes) - 1) // 2]
        found.append(torch.tensor([min(1.0, middle / size) for size in sizes]).double())
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "convnet"])
def test_the_shift_is_what_all_parts_agree_on(name: str) -> None:
    # The residual is that of the inputs that are observed: before anything is shifted.
    decided = PassManager(PRUNE)(small_program(name)).program
    for parts in (1, 2):
        step = ShiftToBias(add=True, parts=parts)
        shifts = step(decided).program.fact(ShiftedBiases).shifts
        assert shifts
        for linear, found in shifts.items():
            averages = [
                (weight[:, None] * rows).sum(0) / weight.sum()
                for weight, rows in zip(
                    weights_of(decided, linear), lost_by(decided, linear), strict=True
                )
            ]
            if parts == 1:
                sizes = [float(weight.sum()) for weight in weights_of(decided, linear)]
                expected = sum(s * a for s, a in zip(sizes, averages, strict=True)) / sum(sizes)
            else:
                # One part for each of the two batches.
                first, second = averages
                nearest = torch.where(first.abs() < second.abs(), first, second)
                expected = torch.where(first * second > 0, nearest, 0.0)
                assert bool(found.shift.any())
            torch.testing.assert_close(found.shift, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SMALL)
def test_the_error_of_no_output_rises_in_any_part(name: str) -> None:
    decided = PassManager(PRUNE)(small_program(name)).program
    shifts = ShiftToBias(add=True)(decided).program.fact(ShiftedBiases).shifts
    assert any(bool(found.shift.any()) for found in shifts.values())
    for linear, found in shifts.items():
        if len(linears_of(decided)[linear].uses) > 1:
            continue  # Parts hold tokens of all uses.
        for weight, rows in zip(weights_of(decided, linear), lost_by(decided, linear), strict=True):
            # Two batches in eight parts: each is cut into four.
            for w, lost in zip(weight.tensor_split(4), rows.tensor_split(4), strict=True):
                if not len(w):
                    continue  # Less rows than parts.
                before = (w[:, None] * lost.square()).sum(0) / w.sum()
                after = (w[:, None] * (lost - found.shift).square()).sum(0) / w.sum()
                noise = 1e-6 * float(lost.abs().max()) ** 2
                assert bool((before - after >= found.shift.square() - noise).all()), linear


def test_agreement() -> None:
    averages = torch.tensor([[1.0, -3, 1, 0, -2], [2.0, -1, -1, 5, -2], [4.0, -2, 2, 5, -2]])
    assert what_all_agree_on(averages).tolist() == [1, -1, 0, 0, -2]
    assert what_all_agree_on(averages[:1]).tolist() == averages[0].tolist()
    assert what_all_agree_on(averages[:0]).tolist() == [0] * 5


class Wide(nn.Module):
    """A linear without nonlinearity in front of it: its inputs are the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def shift_of(batches: Sequence[Tensor], **options: Any) -> Tensor:
    """The shift of a linear that reads batches of [1, tokens, 8]."""
    torch.manual_seed(0)
    program = capture(Wide().eval(), {"x": torch.randn(2, 5, 8)})
    program = dataclasses.replace(program, calibration=tuple({"x": x} for x in batches))
    program = PassManager([PruneMagnitude("50%"), ShiftToBias(**options)])(program).program
    return program.fact(ShiftedBiases).shifts["only.weight"].shift


def test_enormous_tokens_count_like_others() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = [torch.randn(1, 64, 8, generator=generator) + 1 for _ in range(8)]
    direction = torch.randn(8, generator=generator)
    # The first token of each window is a thousand times as large as the others.
    sinks = [torch.cat([1000 * direction.expand(1, 1, 8), x[:, 1:]], 1) for x in plain]
    expected, found = shift_of(plain), shift_of(sinks)
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())
    # The mean over all tokens is another thing.
    means = [torch.cat(x, 1).mean((0, 1)) for x in (plain, sinks)]
    assert float((means[1] - means[0]).norm()) > 10 * float(means[0].norm())


def test_what_differs_from_text_to_text_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randn(1, 32, 8, generator=generator) for _ in range(8)]
    # One channel has a mean that all share, the others one that changes its sign.
    shared = torch.zeros(8)
    shared[0] = 3.0
    signs = torch.randn(8, 1, 1, 8, generator=generator).sign()
    batches = [x + shared + 2 * s for x, s in zip(texts, signs, strict=True)]
    guarded, average = shift_of(batches), shift_of(batches, parts=1)
    other = torch.randn(1, 4096, 8, generator=generator) + shared
    other += 2 * torch.randn(8, generator=generator).sign()
    torch.manual_seed(0)
    weight = Wide().only.weight.detach()
    pruned = PruneMagnitude("50%").pattern
    keep = parse_pattern(pruned).project(weight.abs())
    lost = other[0] @ weight.masked_fill(keep, 0).T

    def error(shift: Tensor) -> float:
        return float((lost - shift).square().sum())

    assert bool(guarded.any())
    assert error(guarded.float()) < error(torch.zeros(6))
    assert bool((guarded.abs() <= average.abs() + 1e-6).all())


def test_one_batch_is_cut_into_parts_and_one_token_agrees_with_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(1, 64, 8, generator=generator)
    whole = shift_of([batch])
    cut = shift_of(list(batch.split(8, 1)))
    # The same eight parts; only what is typical is known for each of them or for all.
    assert float((whole - cut).norm()) < 0.5 * float(cut.norm()) + 1e-3
    assert bool((shift_of([batch[:, :1]]) != 0).any())


def test_a_bias_is_added_where_parts_agree_on_nothing_too() -> None:
    # A configuration gives all linears of a kind a bias, or none.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()
    x = torch.randn(4, 8)
    batches = ({"input": x}, {"input": -x})
    program = dataclasses.replace(capture(model, {"input": x}), calibration=batches)
    decided = PassManager([PruneMagnitude("50%")])(program).program
    found = ShiftToBias(add=True, parts=2)(decided).program
    assert not found.weights["0.bias"].any()


def test_nothing_is_shifted_without_calibration_data() -> None:
    program = dataclasses.replace(small_program("gpt2"), calibration=())
    with pytest.raises(CalibrationError, match="no calibration data"):
        PassManager([PruneMagnitude("2:4"), ShiftToBias()])(program)
    decided = PruneMagnitude("2:4")(program).program
    with pytest.raises(CalibrationError, match="no calibration data"):
        ShiftToBias()(decided)
    for parts in (0, -1):
        with pytest.raises(RecipeError, match="out of range"):
            ShiftToBias(parts=parts)


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN or inf") as caught:
        shift_of([torch.full((1, 4, 8), torch.nan)])
    assert caught.value.where == "only.weight"


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


def test_masks_that_were_applied_are_refused_where_nothing_knows_the_dense_weights() -> None:
    applied = PassManager([*PRUNE, ApplyMasks()])(small_program("gpt2")).program
    with pytest.raises(CompileError, match="applied already") as caught:
        PassManager([ShiftToBias()])(dataclasses.replace(applied, dense=None))
    assert caught.value.pass_name == "shift-to-bias"
    assert "one list with the pruner" in str(caught.value.next_step)


@pytest.mark.parametrize("lists", ["one", "two"])
def test_masks_that_were_applied_give_the_same_shifts(lists: str) -> None:
    # Nothing but the place of apply-masks differs; the dense program gives what it took away.
    start = small_program("gpt2")
    expected = PassManager([*PRUNE, ShiftToBias(), ApplyMasks()])(start).program
    if lists == "one":
        found = PassManager([*PRUNE, ApplyMasks(), ShiftToBias()])(start).program
    else:
        applied = PassManager([*PRUNE, ApplyMasks()])(start).program
        found = PassManager([ShiftToBias()])(applied).program
    shifts = found.fact(ShiftedBiases).shifts
    assert shifts.keys() == expected.fact(ShiftedBiases).shifts.keys()
    first = min(shifts, key=list(linears_of(start)).index)
    # Later layers have other inputs: there what comes before them is pruned and not shifted.
    torch.testing.assert_close(
        shifts[first].shift, expected.fact(ShiftedBiases).shifts[first].shift
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_behind_a_pruner_that_changes_weights_the_whole_difference_counts(name: str) -> None:
    start = small_program(name)
    pruned = PassManager([Observe(gram=True), PruneSparseGPT("2:4")])(start).program
    result = ShiftToBias(add=True, updated=True, parts=1)(pruned).program
    shifts = result.fact(ShiftedBiases).shifts
    assert shifts
    for linear, found in shifts.items():
        dense = linears_of(start)[linear].weight(start).double()
        lost = dense - linears_of(pruned)[linear].weight(pruned).double()
        rows = torch.cat(inputs_of(pruned, linears_of(pruned)[linear]))
        weights = torch.cat(weights_of(pruned, linear))
        mean = (weights[:, None] * (rows @ lost.T)).sum(0) / weights.sum()
        torch.testing.assert_close(found.shift, mean, rtol=1e-4, atol=1e-6)
        # What the mask took away is not all: what stays was changed as well.
        keep = found.mask.keep()
        assert bool(lost.masked_fill(~keep, 0).any())
        weight = linears_of(result)[linear].weight(result)
        assert torch.equal(weight, linears_of(pruned)[linear].weight(pruned))
    again = ShiftToBias(add=True, updated=True, parts=1)(result)
    assert not again.modified


def test_a_pruner_that_made_up_for_what_it_took_is_left_alone() -> None:
    steps = [Observe(gram=True), PruneSparseGPT("2:4")]
    pruned = PassManager(steps)(small_program("gpt2")).program
    result = ShiftToBias(add=True)(pruned)
    found = result.program.fact(ShiftedBiases)
    assert not found.shifts
    assert not result.program.weights.changed_since(pruned.weights)
    assert found.refusals.keys() == pruned.fact(Masks).masks.keys()
    assert all("make up for those that went" in reason for reason in found.refusals.values())


def test_a_bias_that_would_overflow_is_left_alone() -> None:
    model = Wide().half().eval()
    with torch.no_grad():
        model.only.weight.fill_(20.0)
        model.only.bias.fill_(60000.0)
    x = {"x": torch.full((1, 16, 8), 100.0).half()}
    program = dataclasses.replace(capture(model, x), calibration=(x,))
    # Half of the weights take 4 * 20 * 100 away.
    found = PassManager([PruneMagnitude("50%"), ShiftToBias()])(program).program
    assert "overflow" in found.fact(ShiftedBiases).refusals["only.weight"]
    assert bool((found.weights["only.bias"] == 60000).all())


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
    biases = [model.get_parameter(name) for name in added]
    assert {bias.dtype for bias in biases} == {torch.float32}
    assert sum(bool(bias.any()) for bias in biases) > len(biases) / 2
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
