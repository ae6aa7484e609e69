"""sparse_training: against Adam written out, and the rules of the loop."""

from __future__ import annotations

import math

import pytest
import torch

from tests.small import small_program
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.sparse_training import Schedule, TrainedParameters, split, train
from zeroskip.passes import ApplyMasks, PruneMagnitude


def pruned(name: str) -> Program:
    program = small_program(name)
    for step in (PruneMagnitude("50%"), ApplyMasks()):
        program = step(program).program
    return program


def test_steps_are_those_of_adam_on_what_is_kept() -> None:
    program = pruned("mlp")
    masks = {"up.weight": program.fact(SparseWeights).masks["up.weight"]}
    parameters = TrainedParameters(program, masks, vectors=False)
    assert list(parameters.values) == ["up.weight"]
    target = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))

    def loss(index: int, values: object) -> torch.Tensor:
        return (values["up.weight"] - target * (index + 1)).square().sum()  # type: ignore[index]

    schedule = Schedule(epochs=3, learning_rate=0.1, batch=1, patience=3, seed=0)
    found = train(parameters, loss, [0], [0], schedule)

    weight = program.weights["up.weight"].double().clone()
    keep = masks["up.weight"].keep()
    rate = 0.1 * weight[keep].square().mean().sqrt()
    first = second = torch.zeros_like(weight)
    for step in range(3):
        gradient = 2 * (weight - target) * keep
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        slow = min(1.0, 0.5 + 0.5 * math.cos(math.pi * step / 3))
        corrected = first / (1 - 0.9 ** (step + 1))
        scale = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
        weight = weight - rate * slow * corrected / scale
    assert found.epochs == 3
    assert torch.allclose(found.parameters["up.weight"].double(), weight, atol=1e-5)
    assert not found.parameters["up.weight"][~keep].any()


def test_a_batch_of_several_is_their_mean() -> None:
    program = pruned("mlp")
    masks = dict(program.fact(SparseWeights).masks)

    def loss(index: int, values: object) -> torch.Tensor:
        return (index + 1) * values["up.weight"].sum()  # type: ignore[index, no-any-return]

    parameters = TrainedParameters(program, masks, vectors=False)
    seen: list[torch.Tensor] = []
    schedule = Schedule(epochs=1, learning_rate=0.1, batch=2, patience=1, seed=0)
    original = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *arguments: object) -> object:
        seen.append(parameters.values["up.weight"].grad.clone())  # type: ignore[union-attr]
        return original(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        train(parameters, loss, [0, 1], [0], schedule)
    assert torch.equal(seen[0], 1.5 * masks["up.weight"].keep())


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "moe", "convnet"])
def test_what_is_trained(name: str) -> None:
    program = pruned(name)
    masks = program.fact(SparseWeights).masks
    weights = {n.parameter for n in find_linears(program) if n.name in masks}
    plain = TrainedParameters(program, masks, vectors=False)
    assert set(plain.values) == weights
    more = set(TrainedParameters(program, masks, vectors=True).values) - weights
    assert more == {n for n in program.read_weights() if program.weights[n].dim() == 1}
    for parameter, value in plain.values.items():
        assert value.data_ptr() != program.weights[parameter].data_ptr()


def test_training_ends_when_nothing_improves() -> None:
    program = pruned("mlp")
    parameters = TrainedParameters(program, program.fact(SparseWeights).masks, vectors=False)
    calls = []

    def loss(index: int, values: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            calls.append(index)
        return values["up.weight"].square().sum() * 0 + len(calls)  # type: ignore[index]

    schedule = Schedule(epochs=50, learning_rate=0.1, batch=4, patience=3, seed=0)
    found = train(parameters, loss, range(4), [7], schedule)
    assert calls == [7] * 4, "once before training, then three epochs without an improvement"
    assert (found.before, found.after, found.epochs) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("count", "share", "seen", "held"),
    [(1, 0.1, 1, 1), (2, 0.1, 1, 1), (10, 0.1, 9, 1), (32, 0.1, 28, 4), (3, 0.9, 1, 2)],
)
def test_what_decides_is_not_trained_on(count: int, share: float, seen: int, held: int) -> None:
    trained, deciding = split(count, share)
    assert (len(trained), len(deciding)) == (seen, held)
    assert count == 1 or not set(trained) & set(deciding)
