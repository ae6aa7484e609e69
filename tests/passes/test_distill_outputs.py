"""distill-outputs: the divergence is the textbook's, it falls on other data, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.kept_traces import capture_once as capture
from tests.small import small_model, small_program
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.distillation import OutputDivergence, _InTwoParts
from zeroskip.ir.errors import CalibrationError, CompileError, RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.reconstruction import Distilled
from zeroskip.passes import (
    ApplyMasks,
    DistillOutputs,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
)

PRUNE: tuple[Pass, ...] = (Observe(), PruneWanda("50%"), ApplyMasks())


def divergence(dense: Program, sparse: Program, batch: Batch) -> float:
    """KL(dense || sparse), the mean over tokens, as the textbook writes it."""
    p, q = (torch.softmax(program.run(batch)["logits"].double(), -1) for program in (dense, sparse))
    by_token = (p * (p / q).log()).sum(-1)
    return float(by_token[batch["attention_mask"].bool()].mean())


def program_of(name: str) -> tuple[Program, list[dict[str, Tensor]]]:
    entry = ZOO[name]
    batches = [entry.inputs(2, 17 + n, padded=n == 1) for n in range(5)]
    program = capture(entry.model(), entry.inputs())
    return dataclasses.replace(program, calibration=batches), batches


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_divergence_is_that_of_the_textbook(name: str) -> None:
    program, batches = program_of(name)
    pruned = PassManager(PRUNE)(program).program
    measured = OutputDivergence(pruned)
    for index, batch in enumerate(batches):
        expected = divergence(program, pruned, batch)
        assert float(measured(index, {})) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_dense_program_runs_once_where_memory_allows(name: str) -> None:
    """Runs in two parts give the bytes that a run of the whole gives, remembered or not."""
    program, batches = program_of(name)
    all_of_them = _InTwoParts(program, 2**30)
    some = _InTwoParts(program, 3 * 2 * 20 * 32 * 4)
    for dense in (all_of_them, some):
        for _ in range(2):
            for index, batch in enumerate(batches):
                found, wanted = dense.run(index, batch), program.run(batch)
                assert list(found) == list(wanted)
                for output in wanted:
                    assert torch.equal(found[output], wanted[output]), output
    if name == "llama":
        assert len(all_of_them._between) == len(batches)
        assert 0 < len(some._between) < len(batches)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_logits_come_closer_to_the_dense_ones(name: str) -> None:
    program, batches = program_of(name)
    pruned = PassManager(PRUNE)(program).program
    step = DistillOutputs(epochs=12, learning_rate=0.02, batch=1, patience=12)
    trained = PassManager([*PRUNE, step])(program).program
    before, after = (divergence(program, p, batches[-1]) for p in (pruned, trained))
    (found,) = set(trained.fact(Distilled).linears.values())
    assert found.after == pytest.approx(after, rel=1e-3)
    assert after < 0.9 * before
    masks = trained.fact(SparseWeights).masks
    for linear in find_linears(trained):
        if linear.name in masks:
            pruned_away = ~masks[linear.name].keep()
            assert not linear.weight(trained)[pruned_away].any(), linear.name


def test_an_encoder_has_no_logits() -> None:
    program, batches = program_of("bert")
    step = DistillOutputs(epochs=4, learning_rate=0.01)
    trained = PassManager([*PRUNE, step])(program).program
    (found,) = set(trained.fact(Distilled).linears.values())
    assert 0 < found.after < found.before
    wanted, hidden = (p.run(batches[-1])["last_hidden_state"] for p in (program, trained))
    tokens = batches[-1]["attention_mask"].bool()
    errors = (hidden - wanted)[tokens].square().sum(-1) / wanted[tokens].square().sum(-1)
    others = len(program.outputs) - 1
    assert float(errors.mean()) <= found.after + 1e-6
    assert others == 0 or float(errors.mean()) < found.after


def test_nothing_is_taken_that_is_not_better() -> None:
    program = small_program("llama")
    pruned = PassManager(PRUNE)(program).program
    result = PassManager([*PRUNE, DistillOutputs(learning_rate=1e6)])(program).program
    for name in pruned.weights:
        assert torch.equal(pruned.weights[name], result.weights[name])
    assert {found.epochs for found in result.fact(Distilled).linears.values()} == {0}


def test_the_same_bytes_every_time() -> None:
    batches = [ZOO["llama"].inputs(2, 15 + n) for n in range(3)]
    models = [small_model("llama") for _ in range(2)]
    for model in models:
        compile_sparse(model, [*PRUNE, DistillOutputs(epochs=2)], calibration=batches)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_needs_to_know_what_was_dense() -> None:
    pruned = PassManager(PRUNE)(small_program("llama")).program
    with pytest.raises(RequirementError, match="what the dense program computes") as caught:
        PassManager([DistillOutputs()])(dataclasses.replace(pruned, dense=None))
    assert caught.value.pass_name == "distill-outputs"


def test_it_needs_calibration() -> None:
    program = dataclasses.replace(small_program("llama"), calibration=())
    with pytest.raises(CalibrationError, match="no calibration data"):
        PassManager([PruneMagnitude("2:4"), ApplyMasks(), DistillOutputs()])(program)


def test_options_out_of_range() -> None:
    with pytest.raises(CompileError, match="epochs=0 is out of range"):
        DistillOutputs(epochs=0)
