"""reconstruct-blocks: against least squares, on two streams, guarded, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kept_traces import capture_once as capture
from tests.small import small_model, small_program
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.errors import CalibrationError, CompileError, RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.reconstruction import Reconstructed
from zeroskip.passes import (
    ApplyMasks,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    ReconstructBlocks,
)
from zeroskip.passes.base import measure_drift

PRUNE: tuple[Pass, ...] = (Observe(), PruneWanda("50%"), ApplyMasks())


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 7)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


def correlated(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(99))
    return {"features": torch.randn(2, count, 12, generator=generator) @ mixing + 0.5}


def one_linear() -> Program:
    torch.manual_seed(0)
    program = capture(OneLinear().eval(), correlated(5, 0))
    return dataclasses.replace(program, calibration=[correlated(40, n) for n in range(1, 7)])


def least_squares(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """What a linear with these weights and a free bias can come to, row by row, in float64."""
    found = torch.zeros_like(y)
    for row in range(len(keep)):
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        columns = torch.cat([x[:, keep[row]], ones], 1)
        solution = torch.linalg.lstsq(columns, y[:, row : row + 1]).solution
        found[:, row : row + 1] = columns @ solution
    return found


def test_a_linear_comes_close_to_least_squares() -> None:
    program = one_linear()
    pruned = PassManager(PRUNE)(program).program
    step = ReconstructBlocks(epochs=300, learning_rate=0.05, batch=5, loss="stage", patience=300)
    trained = PassManager([*PRUNE, step])(program).program
    x = torch.cat([batch["features"].flatten(0, 1) for batch in program.calibration])
    weight, bias = (program.weights[f"fc.{n}"].double() for n in ("weight", "bias"))
    wanted = x.double() @ weight.T + bias
    keep = trained.fact(SparseWeights).masks["fc.weight"].keep()
    best = float((least_squares(x.double(), wanted, keep) - wanted).square().sum())

    def error(found: Program) -> float:
        (values,) = found.run({"features": x[None]}).values()
        return float((values[0] - wanted).square().sum())

    assert best < error(trained) < 1.1 * best
    assert error(trained) < 0.6 * error(pruned)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "bert"])
def test_stages_give_more_of_what_the_dense_model_gives(name: str) -> None:
    entry = ZOO[name]
    batches = [entry.inputs(2, 17 + n, padded=n == 1) for n in range(5)]
    program = dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)
    pruned = PassManager(PRUNE)(program).program
    result = PassManager([*PRUNE, ReconstructBlocks(epochs=6, held_out=0.2)])(program)
    trained = result.program
    assert measure_drift(program, trained, batches[0]) < measure_drift(program, pruned, batches[0])
    masks = trained.fact(SparseWeights).masks
    for linear in find_linears(trained):
        if linear.name in masks:
            pruned_away = ~masks[linear.name].keep()
            assert not linear.weight(trained)[pruned_away].any(), linear.name
    outcomes = trained.fact(Reconstructed).linears
    assert set(outcomes) == set(trained.fact(SparseWeights).masks)
    assert all(found.after <= found.before for found in outcomes.values())
    assert len({found.before for found in outcomes.values()}) > 1, "each stage has its own error"


def test_the_dense_program_is_the_one_before_pruning() -> None:
    program = dataclasses.replace(small_program("llama"))
    pruned = PassManager(PRUNE)(program).program
    assert pruned.dense is not None
    assert measure_drift(program, pruned.dense) == 0
    assert program.dense is None
    # In a list of its own it knows what the dense model gave all the same.
    later = PassManager([ReconstructBlocks(epochs=2)])(pruned).program
    at_once = PassManager([*PRUNE, ReconstructBlocks(epochs=2)])(program).program
    for name in program.weights:
        assert torch.equal(later.weights[name], at_once.weights[name]), name


def test_a_later_list_uses_dense_outputs_of_every_stage() -> None:
    entry = ZOO["llama"]
    batches = [entry.inputs(2, 17 + n) for n in range(4)]
    program = dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)
    step = ReconstructBlocks(epochs=2)
    pruned = PassManager([PruneMagnitude("2:4"), ApplyMasks()])(program).program
    later = PassManager([step])(pruned).program.fact(Reconstructed).linears
    at_once = PassManager([PruneMagnitude("2:4"), ApplyMasks(), step])(program)
    assert later == at_once.program.fact(Reconstructed).linears


def test_nothing_is_taken_that_is_not_better() -> None:
    program = one_linear()
    pruned = PassManager(PRUNE)(program).program
    wild = ReconstructBlocks(epochs=2, learning_rate=1e6)
    result = PassManager([*PRUNE, wild])(program).program
    for name in pruned.weights:
        assert torch.equal(pruned.weights[name], result.weights[name])
    (found,) = set(result.fact(Reconstructed).linears.values())
    assert found.epochs == 0
    assert found.before == found.after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32(dtype: torch.dtype) -> None:
    model = small_model("llama").to(dtype)
    batches = [ZOO["llama"].inputs(2, 15 + n) for n in range(5)]
    steps = [*PRUNE, ReconstructBlocks(epochs=8, learning_rate=0.02)]
    compiled = compile_sparse(model, steps, calibration=batches)
    weights = compiled.program.weights
    assert {weights.source(name).dtype for name in weights} == {dtype}
    outcomes = compiled.program.fact(Reconstructed).linears.values()
    # Steps of Adam far below half a unit of bfloat16 would change nothing if they were rounded.
    assert all(found.after < 0.97 * found.before for found in outcomes)


def test_padding_says_nothing() -> None:
    entry = ZOO["llama"]
    program = capture(entry.model(), entry.inputs())
    plain = [entry.inputs(2, 16, padded=True) for _ in range(3)]
    other = []
    for batch in plain:
        tokens = batch["input_ids"].clone()
        tokens[batch["attention_mask"] == 0] = 5
        other.append({**batch, "input_ids": tokens})
    assert any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain, other, strict=True)
    )
    steps = [*PRUNE, ReconstructBlocks(epochs=2)]
    first, second = (
        PassManager(steps)(dataclasses.replace(program, calibration=batches)).program
        for batches in (plain, other)
    )
    for name in first.weights:
        assert torch.equal(first.weights[name], second.weights[name]), name


@pytest.mark.parametrize(
    "options", [{"inputs": "dense"}, {"inputs": "both"}, {"loss": "stage"}, {"vectors": False}]
)
def test_options_change_what_is_learned(options: dict[str, Any]) -> None:
    entry = ZOO["llama"]
    batches = [entry.inputs(2, 17 + n) for n in range(4)]
    program = dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)
    plain = PassManager([*PRUNE, ReconstructBlocks(epochs=2)])(program).program
    other = PassManager([*PRUNE, ReconstructBlocks(epochs=2, **options)])(program).program
    down = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(plain.weights[down], other.weights[down])
    norm = "model.layers.1.input_layernorm.weight"
    still = torch.equal(program.weights[norm], other.weights[norm])
    assert still == ("vectors" in options)


def test_the_same_bytes_every_time_and_the_model_keeps_its_gradients() -> None:
    batches = [ZOO["llama"].inputs(2, 15 + n) for n in range(3)]
    steps = [*PRUNE, ReconstructBlocks(epochs=2)]
    models = [small_model("llama") for _ in range(2)]
    for model in models:
        compile_sparse(model, steps, calibration=batches)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_excluded_stays() -> None:
    program = small_program("llama")
    step = ReconstructBlocks(epochs=1, exclude=("*.q_proj", "*.down_proj"))
    pruned = PassManager(PRUNE)(program).program
    trained = PassManager([*PRUNE, step])(program).program
    for name in trained.fact(SparseWeights).masks:
        same = torch.equal(pruned.weights[name], trained.weights[name])
        assert same == ("q_proj" in name or "down_proj" in name), name


def test_it_needs_calibration() -> None:
    program = dataclasses.replace(small_program("llama"), calibration=())
    steps = [PruneMagnitude("2:4"), ApplyMasks(), ReconstructBlocks()]
    with pytest.raises(CalibrationError, match="no calibration data") as caught:
        PassManager(steps)(program)
    assert caught.value.pass_name == "reconstruct-blocks"


def test_it_needs_to_know_what_was_dense() -> None:
    pruned = PassManager(PRUNE)(small_program("llama")).program
    with pytest.raises(RequirementError, match="nothing knows its dense weights") as caught:
        PassManager([ReconstructBlocks()])(dataclasses.replace(pruned, dense=None))
    assert "one list with the pruner" in str(caught.value.next_step)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"batch": 0},
        {"loss": "l1"},
        {"inputs": "sparse"},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"patience": 0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match="is out of range") as caught:
        ReconstructBlocks(**options)
    assert next(iter(options)) in str(caught.value)
