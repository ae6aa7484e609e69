"""prune-magnitude: the masks of a plain sort, for every pattern; names, widths, bad numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.passes import references
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, PatternError
from zeroskip.ir.facts import Masks, Roles
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.passes import ApplyMasks, Observe, Pass, PassManager, PruneMagnitude, PruneWanda

REAL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"


def decide(program: Program, step: Pass) -> dict[str, torch.Tensor]:
    """Runs a pruner as a compilation would, refusals before the run included."""
    masks = PassManager([step])(program).program.fact(Masks).masks
    return {name: mask.keep() for name, mask in masks.items()}


def magnitudes(program: Program) -> dict[str, torch.Tensor]:
    """Returns |W| as [out, in] of every linear without a special role, taken from the model."""
    assert program.model is not None
    parameters = dict(program.model.named_parameters())
    roles = program.fact(Roles)
    return {
        linear.name: linear.view(parameters[linear.parameter].detach()).abs()
        for linear in find_linears(program)
        if roles.role(linear.name) is None
    }


def with_up(weight: torch.Tensor) -> Program:
    """Returns the small mlp with another 24 x 16 weight."""
    return small_program("mlp").with_weights({"up.weight": weight})


@pytest.mark.real
def test_masks_of_a_real_model() -> None:
    assert REAL.is_dir(), f"{REAL} is missing: run `make models`"
    model = hf.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:10]
    model.config.num_hidden_layers = 10
    program = capture(model, {"input_ids": torch.arange(18).view(2, 9)})
    expected = magnitudes(program)
    assert len(expected) == 70
    for pattern in ("0.5", "2:4"):
        for name, kept in decide(program, PruneMagnitude(pattern)).items():
            assert torch.equal(kept, references.keep(expected[name], pattern)), name


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "4:8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_masks_are_those_of_a_stable_sort(
    name: str, pattern: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    found = decide(program, PruneMagnitude(pattern))
    expected = {n: references.keep(w, pattern) for n, w in magnitudes(program).items()}
    assert list(found) == list(expected)
    for linear, kept in expected.items():
        assert torch.equal(found[linear], kept), linear


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.99])
def test_comparison_within_a_matrix(sparsity: float, captured: Callable[[str], Program]) -> None:
    program = captured("gpt2")
    found = decide(program, PruneMagnitude(f"{sparsity} matrix"))
    for name, weight in magnitudes(program).items():
        kept = references.keep_rows(weight.reshape(1, -1), sparsity).view(weight.shape)
        assert torch.equal(found[name], kept), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_comparison_across_linears(
    name: str, sparsity: float, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    found = decide(program, PruneMagnitude(f"{sparsity} global"))
    weights = magnitudes(program)
    everything = torch.cat([w.reshape(-1) for w in weights.values()])
    kept = references.keep_rows(everything[None], sparsity)[0]
    sizes = [w.numel() for w in weights.values()]
    for linear, part in zip(weights, kept.split(sizes), strict=True):
        assert torch.equal(found[linear].reshape(-1), part), linear


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_ties_across_linears_go_by_position(levels: int, sparsity: float) -> None:
    # With so few different magnitudes nearly everything ties with the threshold.
    program = small_program("mlp")
    generator = torch.Generator().manual_seed(levels)
    updates = {
        name: torch.randint(-levels + 1, levels, program.weights[name].shape, generator=generator)
        for name in ("up.weight", "down.weight")
    }
    program = program.with_weights({name: w.float() for name, w in updates.items()})
    found = decide(program, PruneMagnitude(f"{sparsity} global"))
    everything = torch.cat([updates[name].abs().reshape(-1) for name in found]).float()
    kept = references.keep_rows(everything[None], sparsity)[0]
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in found.values()]), kept)
    assert int(kept.sum()) == everything.numel() - int(everything.numel() * sparsity)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
def test_ties_and_zero_rows_go_by_position(pattern: str) -> None:
    weight = torch.ones(24, 16)
    weight[3] = 0
    weight[:, 5] = -1
    kept = decide(with_up(weight), PruneMagnitude(pattern, include=("up",)))["up.weight"]
    assert torch.equal(kept, references.keep(weight.abs(), pattern))
    assert (kept.sum(1) == 8).all()


def test_blocks_are_compared_by_their_sum() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    step = PruneMagnitude("block:4x8:0.5", include=("up",))
    kept = decide(with_up(weight), step)["up.weight"]
    sums = [
        (float(weight[r : r + 4, c : c + 8].abs().double().sum()), r, c)
        for r in range(0, 24, 4)
        for c in range(0, 16, 8)
    ]
    expected = torch.ones(24, 16, dtype=torch.bool)
    for _, r, c in sorted(sums)[:6]:
        expected[r : r + 4, c : c + 8] = False
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pattern", ["2:4", "0.5 global"])
def test_a_weight_that_is_not_finite_is_refused(value: float, pattern: str) -> None:
    weight = torch.ones(24, 16)
    weight[7, 11] = value
    with pytest.raises(CompileError, match=rf"holds {value} at \[7, 11\]") as caught:
        decide(with_up(weight), PruneMagnitude(pattern))
    assert caught.value.where == "up.weight"
    assert caught.value.pass_name == "prune-magnitude"
    assert caught.value.next_step


def test_the_position_of_a_bad_number_is_that_of_the_linear() -> None:
    # Conv1D stores [in, out]; the message speaks of [out, in].
    program = small_program("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = program.weights[name].clone()
    weight[3, 5] = float("nan")
    with pytest.raises(CompileError, match=r"at \[5, 3\]") as caught:
        decide(program.with_weights({name: weight}), PruneMagnitude("2:4"))
    assert caught.value.where == name


def test_a_width_that_does_not_divide_is_refused_or_padded(
    captured: Callable[[str], Program],
) -> None:
    program = captured("mlp")  # 13 wide and 27 wide.
    with pytest.raises(PatternError, match="13 is not a multiple of 4") as caught:
        decide(program, PruneMagnitude("2:4"))
    assert caught.value.where == "up.weight"
    assert caught.value.pass_name == "prune-magnitude"
    assert '"2:4 pad"' in str(caught.value.next_step)
    found = decide(program, PruneMagnitude("2:4 pad"))
    for name, weight in magnitudes(program).items():
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4), value=-1)
        expected = references.keep_n_of_m(padded, 2, 4)[:, : weight.shape[1]]
        assert torch.equal(found[name], expected), name
    with pytest.raises(PatternError, match="cannot be cut into") as caught:
        decide(program, PruneMagnitude("block:4x4:0.5"))
    assert caught.value.where == "up.weight"


def test_heads_and_routers_are_pruned_only_when_named(captured: Callable[[str], Program]) -> None:
    program = captured("mixtral")
    default = decide(program, PruneMagnitude("2:4"))
    assert not [n for n in default if "lm_head" in n or ".gate." in n]
    assert any(".experts." in name for name in default)
    named = decide(program, PruneMagnitude("2:4", include=("lm_head", "*.gate")))
    assert len(named) == 3
    assert sorted(named)[0] == "lm_head.weight"
    for name, kept in named.items():
        weight = program.weights[name].abs()
        assert torch.equal(kept, references.keep(weight, "2:4")), name


def test_a_tied_head_is_pruned_only_when_named(captured: Callable[[str], Program]) -> None:
    program = captured("llama_tied")
    (name,) = program.fact(Roles).heads
    assert name not in decide(program, PruneMagnitude("2:4"))
    assert list(decide(program, PruneMagnitude("2:4", include=(name,)))) == [name]


def test_include_and_exclude(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    names = set(decide(program, PruneMagnitude("2:4")))
    mlp = {n for n in names if ".mlp." in n}
    assert set(decide(program, PruneMagnitude("2:4", include=("*.mlp.*",)))) == mlp
    assert set(decide(program, PruneMagnitude("2:4", exclude=("*.mlp.*",)))) == names - mlp
    both = PruneMagnitude("2:4", include=("*.mlp.*",), exclude=("*.down_proj",))
    assert set(decide(program, both)) == {n for n in mlp if "down_proj" not in n}
    with pytest.raises(CompileError, match="matches no linear") as caught:
        decide(program, PruneMagnitude("2:4", exclude=("*.mpl.*",)))
    assert "q_proj" in str(caught.value.next_step)
    with pytest.raises(CompileError, match="no linear is left") as caught:
        decide(program, PruneMagnitude("2:4", exclude=("*",)))
    assert caught.value.next_step


def test_one_expert_can_be_named(captured: Callable[[str], Program]) -> None:
    name = "model.layers.0.mlp.experts.down_proj[2]"
    everything = decide(captured("mixtral"), PruneMagnitude("2:4"))
    for pattern in (name, name.replace("[", "[[]")):
        found = decide(captured("mixtral"), PruneMagnitude("2:4", include=(pattern,)))
        assert list(found) == [name]
        rest = decide(captured("mixtral"), PruneMagnitude("2:4", exclude=(pattern,)))
        assert set(everything) - set(rest) == {name}


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "1.5", "-0.1", "half", "2:4:8", "100%", ""])
def test_a_malformed_pattern_is_refused_at_once(pattern: str) -> None:
    with pytest.raises(PatternError):
        PruneMagnitude(pattern)


def test_the_last_decision_about_a_linear_holds() -> None:
    steps: list[Pass] = [PruneMagnitude("2:4"), PruneMagnitude("4:8", include=("down",))]
    masks = PassManager(steps)(small_program("mlp")).program.fact(Masks).masks
    assert {name: str(mask.pattern) for name, mask in masks.items()} == {
        "up.weight": "2:4",
        "down.weight": "4:8",
    }


def test_low_precision_weights_are_scored_exactly() -> None:
    entry = ZOO["mlp"]
    model = entry.model(dtype=torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) for k, v in entry.inputs().items()}
    program = capture(model, inputs)
    found = decide(program, PruneMagnitude("0.5"))
    for name, weight in magnitudes(program).items():
        assert torch.equal(found[name], references.keep(weight.float(), "0.5")), name


def test_magnitude_before_wanda_is_replaced_where_both_decide() -> None:
    program = small_program("mlp")
    steps: list[Pass] = [PruneMagnitude("2:4"), Observe(), PruneWanda("2:4"), ApplyMasks()]
    alone: list[Pass] = [Observe(), PruneWanda("2:4"), ApplyMasks()]
    first, second = (PassManager(s)(program).program for s in (steps, alone))
    for name in first.weights:
        assert torch.equal(first.weights[name], second.weights[name]), name
