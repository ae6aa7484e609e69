"""prune-cvr: the masks of the paper's equation, and what it must not be confused with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes import references
from tests.small import small_model, small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import Masks
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import Observe, PassManager, PruneCVR


def published(weight: Tensor, inputs: Tensor, alpha: float = 1.0) -> Tensor:
    """S = |W| Var(x)^(1/4) (Var(W) + eps)^(-alpha / 2), in float64; inputs are [tokens, in]."""
    weight, inputs = weight.double(), inputs.double()
    activity = inputs.var(dim=0, correction=0) ** 0.25
    spread = weight.var(dim=0, correction=0)
    return weight.abs() * activity * (spread + 1e-8 * spread.mean()) ** (-alpha / 2)


def program_of(weight: Tensor, inputs: Tensor) -> Program:
    """A program of one linear that has observed its inputs."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    inputs = inputs.to(weight.dtype)
    program = capture(nn.Sequential(layer).eval(), {"input": inputs[:2]})
    program = dataclasses.replace(program, calibration=({"input": inputs},))
    return Observe()(program).program


def kept(program: Program, pattern: str = "50%", **options: Any) -> Tensor:
    return PruneCVR(pattern, **options)(program).program.fact(Masks).masks["0.weight"].keep()


def drawn(rows: int, columns: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight whose columns differ in spread and mean, and inputs that do as well."""
    generator = torch.Generator().manual_seed(rows)

    def uneven(count: int) -> Tensor:
        values = torch.randn(count, columns, generator=generator)
        sizes = torch.rand(columns, generator=generator) + 0.2
        return values * sizes + torch.randn(columns, generator=generator)

    return uneven(rows), uneven(tokens)


@pytest.mark.parametrize("shape", [(24, 32), (48, 16), (7, 20)])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_masks_are_those_of_the_equation(shape: tuple[int, int], alpha: float) -> None:
    weight, inputs = drawn(*shape)
    program = program_of(weight, inputs)
    scores = published(weight, inputs, alpha)
    assert torch.equal(kept(program, "50%", alpha=alpha), references.keep_rows(scores, 0.5))
    assert torch.equal(kept(program, "2:4", alpha=alpha), references.keep_n_of_m(scores, 2, 4))
    whole = references.keep_rows(scores.view(1, -1), 0.3).view(shape)
    assert torch.equal(kept(program, "30% matrix", alpha=alpha), whole)


def test_variances_are_over_outputs_and_over_tokens() -> None:
    weight, inputs = drawn(24, 32)
    mask = kept(program_of(weight, inputs), "50% matrix")
    activity = inputs.double().var(dim=0, correction=0) ** 0.25
    by_row = weight.double().abs() * activity / weight.double().std(1, keepdim=True)
    wrong = references.keep_rows(by_row.view(1, -1), 0.5).view(24, 32)
    assert not torch.equal(mask, wrong)
    by_size = weight.abs() * inputs.square().mean(0) ** 0.25 / weight.std(0)
    assert not torch.equal(mask, references.keep_rows(by_size.view(1, -1), 0.5).view(24, 32))


def test_a_large_constant_input_counts_for_nothing() -> None:
    weight, inputs = drawn(24, 32)
    inputs[:, 4] = 1000.0
    mask = kept(program_of(weight, inputs), "25%")
    assert not mask[:, 4].any()
    assert bool((mask.sum(1) == 24).all())


def test_massive_activations_do_not_cancel() -> None:
    # E[x^2] - E[x]^2 in float32 loses all of a variance of 1 beside a mean of 10^4.
    weight, inputs = drawn(24, 32, tokens=400)
    inputs[:, ::3] += 1e4
    scores = published(weight, inputs)
    assert torch.equal(kept(program_of(weight, inputs)), references.keep_rows(scores, 0.5))


def test_an_outlier_channel_counts_by_the_fourth_root() -> None:
    weight = torch.ones(2, 4) + torch.tensor([[0.1], [-0.1]])
    weight[:, 1:] *= 3
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    # 80^2 under the fourth root is 8.9, 8^2 is 2.8: only one of them makes up for a third of W.
    for size, survives in ((80.0, True), (8.0, False)):
        scaled = inputs * torch.tensor([size, 1.0, 1.0, 1.0])
        assert bool(kept(program_of(weight, scaled), "75%", alpha=0)[0, 0]) == survives


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype: torch.dtype) -> None:
    weight, inputs = drawn(24, 32)
    weight, inputs = weight.to(dtype), inputs.to(dtype)
    # Squares of these are beyond what float16 has, on either side.
    weight[:, 3] *= 2.0**-12
    inputs[:, 5] *= 2.0**9
    scores = published(weight, inputs)
    assert torch.equal(kept(program_of(weight, inputs)), references.keep_rows(scores, 0.5))


def test_awkward_shapes() -> None:
    weight, inputs = drawn(1, 16)
    # Nothing varies over one output: the columns are left as they are.
    activity = inputs.double().var(dim=0, correction=0) ** 0.25
    expected = references.keep_rows(weight.double().abs() * activity, 0.5)
    assert torch.equal(kept(program_of(weight, inputs)), expected)
    weight, inputs = drawn(16, 1)
    mask = kept(program_of(weight, inputs), "50% matrix")
    assert torch.equal(mask, references.keep_rows(weight.abs().view(1, -1), 0.5).view(16, 1))


def test_dead_columns_and_rows() -> None:
    weight, inputs = drawn(24, 32)
    weight[:, [0, 9]] = 0
    weight[5] = 0
    mask = kept(program_of(weight, inputs))
    assert torch.equal(mask, references.keep_rows(published(weight, inputs), 0.5))
    assert bool((mask.sum(1) == 16).all())


def test_where_nothing_varies_columns_alone_decide() -> None:
    weight, inputs = drawn(24, 32)
    constant = inputs[:1].expand(8, -1).sign() * 0.5  # Sums of these are exact.
    spread = weight.double().std(0, correction=0)
    expected = references.keep_rows(weight.double().abs() / spread, 0.5)
    assert torch.equal(kept(program_of(weight, constant)), expected)
    zeros = torch.zeros(4, 32)
    ties = (torch.arange(32) >= 16).expand(4, 32)
    assert torch.equal(kept(program_of(zeros, inputs)), ties)


def test_the_same_with_one_thread_and_with_two() -> None:
    weight, inputs = drawn(512, 384)
    program = program_of(weight, inputs)
    before = torch.get_num_threads()
    masks = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        try:
            masks.append(kept(program, "50% matrix"))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.filterwarnings("ignore:prune-cvr prunes")
@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_transposed_weights_and_experts(name: str) -> None:
    observed = Observe()(small_program(name)).program
    masks = PruneCVR("50%")(observed).program.fact(Masks).masks
    parameters = dict(small_model(name).named_parameters())
    few = 0
    for linear, mask in masks.items():
        edge = observed.fact(Statistics).of(linear)
        parameter, _, expert = linear.removesuffix("]").partition("[")
        weight = parameters[parameter].detach().double()
        weight = weight[int(expert)] if expert else weight
        weight = weight.T if name == "gpt2" else weight
        scores = weight.abs()
        if expert and edge.count < 16:
            few += 1
        else:
            mean = edge.total / edge.count
            variance = edge.total_of_squares / edge.count - mean.square()
            spread = weight.var(dim=0, correction=0)
            scores = scores * variance**0.25 * (spread + 1e-8 * spread.mean()) ** -0.5
        assert torch.equal(mask.keep(), references.keep_rows(scores, 0.5)), linear
    assert bool(few) == (name == "moe")


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", -0.5), ("alpha", float("inf")), ("epsilon", 0.0), ("epsilon", float("nan"))],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{option}=.* out of range") as caught:
        PruneCVR(**{option: value})  # type: ignore[arg-type]
    assert caught.value.pass_name == "prune-cvr"
    assert caught.value.next_step


def test_refusals() -> None:
    with pytest.raises(PatternError, match="on a scale of its own"):
        PassManager([Observe(), PruneCVR("50% global")])(small_program("mlp"))
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager([Observe(exclude=("down",)), PruneCVR("2:4")])(small_program("mlp"))
    assert caught.value.where == "down.weight"
    weight, inputs = drawn(8, 8)
    program = program_of(weight, inputs)
    broken = weight.clone()
    broken[2, 3] = float("inf")
    with pytest.raises(CompileError, match=r"holds inf at \[2, 3\]"):
        kept(program.with_weights({"0.weight": broken}))
