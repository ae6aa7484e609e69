"""observe: the statistics of the numbers that enter a linear, and of nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tests.small import SMALL, small_model, small_program
from zeroskip.ir.errors import CalibrationError, CompileError
from zeroskip.ir.linears import find_linears
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import Observe, PassManager


def observe(program: Program, step: Observe) -> Statistics:
    return PassManager([step])(program).program.fact(Statistics)


def rows_entering(model: nn.Module, program: Program, name: str) -> torch.Tensor:
    """Returns the unpadded rows that enter a linear of a live model, by a hook."""
    module = model.get_submodule(name.removesuffix(".weight"))
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = []
    with torch.no_grad():
        for batch in program.calibration:
            model(**batch)
            (entered,) = seen
            seen.clear()
            mask = batch.get("attention_mask", torch.ones(entered.shape[:-1])).bool()
            rows.append(entered[mask])
    hook.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_statistics_are_those_of_the_unpadded_rows(name: str) -> None:
    program = small_program(name)
    edges = observe(program, Observe(gram=True)).edges
    assert any(bool((b["attention_mask"] == 0).any()) for b in program.calibration)
    for linear, edge in edges.items():
        rows = rows_entering(small_model(name), program, linear)
        assert edge.count == len(rows)
        torch.testing.assert_close(edge.total, rows.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(edge.total_of_squares, (rows**2).sum(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(edge.abs_max.double(), rows.abs().amax(0), rtol=1e-6, atol=0)
        assert edge.gram is not None
        torch.testing.assert_close(edge.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(edge.root_mean_square().double(), (rows**2).mean(0).sqrt())
        torch.testing.assert_close(edge.variance(), rows.var(0, correction=0))
        torch.testing.assert_close(edge.mean(), rows.mean(0), rtol=1e-5, atol=1e-6)


def test_every_token_enters_its_experts_once_padding_none() -> None:
    program = small_program("moe")
    edges = observe(program, Observe()).edges
    tokens = sum(int(batch["attention_mask"].sum()) for batch in program.calibration)
    for parameter in ("gate_up_proj", "down_proj"):
        counts = [edges[f"model.layers.0.mlp.experts.{parameter}[{e}]"].count for e in range(4)]
        assert sum(counts) == 2 * tokens, parameter
    assert edges["model.layers.0.self_attn.o_proj.weight"].count == tokens


def test_an_expert_that_no_token_reaches_is_all_zeros() -> None:
    program = small_program("moe")
    router = "model.layers.0.mlp.gate.weight"
    weight = program.weights[router].clone()
    weight[2] = weight[1]
    weight[3] = weight[1]  # Ties between experts: top-2 can at most reach two of three.
    edges = observe(program.with_weights({router: weight * 0}), Observe()).edges
    idle = [e for e in range(4) if not edges[f"model.layers.0.mlp.experts.down_proj[{e}]"].count]
    assert len(idle) == 2
    for e in idle:
        rms = edges[f"model.layers.0.mlp.experts.down_proj[{e}]"].root_mean_square()
        assert not rms.any()


def test_linears_that_share_an_input_share_statistics() -> None:
    edges = observe(small_program("llama"), Observe()).edges
    attention = [edges[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkvo"]
    assert attention[0] is attention[1] is attention[2]
    assert attention[3] is not attention[0]
    mlp = [edges[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
    assert mlp[0] is mlp[1]
    assert mlp[2] is not mlp[0]


def test_selection_is_that_of_the_pruners() -> None:
    program = small_program("llama")
    assert "lm_head.weight" not in observe(program, Observe()).edges
    assert set(observe(program, Observe(include=("lm_head",))).edges) == {"lm_head.weight"}
    left = observe(program, Observe(exclude=("*.mlp.*",))).edges
    assert left
    assert not [name for name in left if ".mlp." in name]
    with pytest.raises(CompileError, match="matches no linear"):
        observe(program, Observe(include=("*.nothing",)))


@pytest.mark.parametrize("name", SMALL)
def test_observers_are_removed(name: str) -> None:
    program = small_program(name)
    result = PassManager([Observe()])(program).program
    assert result.level == "captured"
    text = print_program(result)
    assert text == print_program(program).rstrip("\n") + "\n  fact Statistics\n"


def test_observers_can_be_kept_to_look_at() -> None:
    program = small_program("mlp")
    kept = Observe(keep=True)(program).program
    assert kept.level == "annotated"
    assert "@observer_0(" in print_program(kept)
    for key, value in kept.run(program.example_inputs).items():
        assert torch.equal(value, program.run(program.example_inputs)[key])


def test_gram_is_recorded_only_when_asked_for() -> None:
    program = small_program("mlp")
    assert all(e.gram is None for e in observe(program, Observe()).edges.values())
    assert all(e.gram is not None for e in observe(program, Observe(gram=True)).edges.values())


def test_a_tied_weight_has_the_statistics_of_all_that_enters_it() -> None:
    program = small_program("mlp")
    (up,) = [linear for linear in find_linears(program) if linear.name == "up.weight"]
    assert len(up.uses) == 2
    edge = observe(program, Observe()).edges["up.weight"]
    model = small_model("mlp")
    rows = torch.cat([rows_entering(model, program, name) for name in ("up", "again")])
    assert edge.count == len(rows)
    torch.testing.assert_close(edge.total_of_squares, (rows**2).sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    program = small_program("mlp")
    bias = program.weights["again.bias"].clone()
    bias[3] = value
    with pytest.raises(CalibrationError, match="first in channel 3") as caught:
        observe(program.with_weights({"again.bias": bias}), Observe())
    assert caught.value.where == "down.weight"
    assert caught.value.pass_name == "observe"
    assert caught.value.next_step


def test_a_program_without_calibration_is_refused() -> None:
    program = dataclasses.replace(small_program("mlp"), calibration=())
    with pytest.raises(CalibrationError, match="no calibration data") as caught:
        observe(program, Observe())
    assert caught.value.pass_name == "observe"
    assert "calibration=" in str(caught.value.next_step)
