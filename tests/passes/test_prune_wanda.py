"""prune-wanda: the same masks as the paper's loop, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from tests.kept_traces import capture_once as capture
from tests.passes import references
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip import calibration_from_text, compile_sparse
from zeroskip.ir.errors import CalibrationError, CompileError, PatternError, RequirementError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.passes import ApplyMasks, Observe, PassManager, PruneWanda

REAL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
TEXT = Path(__file__).parents[2] / "examples" / "data" / "calibration.txt"


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers."""
    inner = getattr(model, "transformer", None) or model.model
    inner = getattr(inner, "decoder", inner)
    return inner.h if hasattr(inner, "h") else inner.layers


def assert_same_masks(program: Program, expected: dict[str, torch.Tensor]) -> None:
    masks = program.fact(SparseWeights).masks
    found = {name: mask.keep() for name, mask in masks.items()}
    assert set(found) == set(expected)
    for name, kept in found.items():
        different = int((kept != expected[name]).sum())
        assert different == 0, f"{name}: {different} of {kept.numel()} differ"


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon", "mixtral"])
def test_masks_are_those_of_the_sequential_loop(name: str) -> None:
    entry = ZOO[name]
    batches = [entry.inputs(2, 33), entry.inputs(3, 20, padded=True), entry.inputs(1, 17)]
    program = dataclasses.replace(capture(entry.model(), entry.inputs()), calibration=batches)
    for pattern in ("0.5", "2:4", "4:8"):
        steps = (Observe(), PruneWanda(pattern), ApplyMasks())
        pruned = PassManager(steps)(program).program
        model = entry.model()
        expected = references.wanda(model, blocks_of(model), batches, pattern)
        assert_same_masks(pruned, expected)
        for key, value in model.named_parameters():
            assert torch.equal(value, pruned.weights[key]), key


@pytest.mark.real
def test_masks_of_a_real_model() -> None:
    assert REAL.is_dir(), f"{REAL} is missing: run `make models`"
    tokenizer = hf.AutoTokenizer.from_pretrained(REAL)
    batches = calibration_from_text(TEXT, tokenizer, samples=32, sequence_length=512)

    def two_layers() -> nn.Module:
        model = hf.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        return model.eval()

    for pattern in ("0.5", "2:4"):
        passes = [Observe(), PruneWanda(pattern), ApplyMasks()]
        compiled = compile_sparse(two_layers(), passes, calibration=batches)
        model = two_layers()
        expected = references.wanda(model, blocks_of(model), batches, pattern)
        assert len(expected) == 14
        assert_same_masks(compiled.program, expected)


def statistics(program: Program, squares: torch.Tensor, name: str = "up.weight") -> Program:
    """Returns a program that knows the mean square of each input channel of one linear."""
    zeros = torch.zeros_like(squares)
    edge = EdgeStatistics(1, zeros.double(), squares.double(), zeros)
    return program.with_fact(Statistics({name: edge}))


def decide(program: Program, step: PruneWanda) -> dict[str, torch.Tensor]:
    masks = step(program).program.fact(Masks).masks
    return {name: mask.keep() for name, mask in masks.items()}


def test_dead_channels_are_pruned_first() -> None:
    squares = torch.ones(16)
    squares[[1, 3, 5, 9]] = 0
    program = statistics(small_program("mlp"), squares)
    kept = decide(program, PruneWanda("25%", include=("up",)))["up.weight"]
    assert not kept[:, [1, 3, 5, 9]].any()
    assert int(kept.sum()) == 24 * 12


def test_ties_go_by_position() -> None:
    # A dead edge: every score is zero, and a stable sort prunes the first ones.
    program = statistics(small_program("mlp"), torch.zeros(16))
    kept = decide(program, PruneWanda("50%", include=("up",)))["up.weight"]
    assert torch.equal(kept, (torch.arange(16) >= 8).expand(24, 16))
    kept = decide(program, PruneWanda("2:4", include=("up",)))["up.weight"]
    assert torch.equal(kept, (torch.arange(16) % 4 >= 2).expand(24, 16))


def test_comparison_within_the_matrix() -> None:
    program = statistics(small_program("mlp"), torch.arange(16) + 1.0)
    (linear,) = [n for n in find_linears(program) if n.name == "up.weight"]
    scores = linear.weight(program).abs() * (torch.arange(16) + 1.0).sqrt()
    kept = decide(program, PruneWanda("30% matrix", include=("up",)))["up.weight"]
    assert torch.equal(kept, references.keep_rows(scores.view(1, -1), 0.3).view(24, 16))


def test_an_overflowing_score_is_refused() -> None:
    program = statistics(small_program("mlp"), torch.full((16,), 1e76, dtype=torch.float64))
    weight = torch.full((24, 16), 1e3)
    program = program.with_weights({"up.weight": weight})
    with pytest.raises(CompileError, match="overflow") as caught:
        PruneWanda(include=("up",))(program)
    assert caught.value.where == "up.weight"
    assert caught.value.next_step


def test_comparison_across_linears_is_refused() -> None:
    with pytest.raises(PatternError, match="on a scale of its own") as caught:
        PassManager([Observe(), PruneWanda("50% global")])(small_program("mlp"))
    assert caught.value.pass_name == "prune-wanda"
    assert "50% matrix" in str(caught.value.next_step)


def test_a_linear_without_statistics_is_refused() -> None:
    steps = [Observe(exclude=("down",)), PruneWanda("2:4")]
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.where == "down.weight"
    assert "include" in str(caught.value.next_step)


def test_calibration_is_asked_for() -> None:
    program = dataclasses.replace(small_program("mlp"), calibration=())
    with pytest.raises(CalibrationError, match="no calibration data") as caught:
        PassManager([Observe(), PruneWanda("2:4")])(program)
    assert caught.value.pass_name == "observe"
