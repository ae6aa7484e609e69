"""train-elastic and materialize-elastic: exact where they must be, better where they promise to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.kept_traces import capture_once as capture
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip.ir.elastic import LEVELS, Elastic
from zeroskip.ir.elastic_training import ElasticStage, draw_thresholds, share_groups, thresholds_of
from zeroskip.ir.errors import (
    CalibrationError,
    CompileError,
    PatternError,
    RecipeError,
    RequirementError,
)
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import NM, Unstructured
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import ApplyMasks, Observe, PassManager, PruneMagnitude, PruneWanda
from zeroskip.passes.materialize_elastic import MaterializeElastic
from zeroskip.passes.train_elastic import TrainElastic

QUICK: dict[str, Any] = {"groups": (0.5, 0.7), "rank": 4, "epochs": 2}


def calibrated(name: str, batches: int = 4) -> Program:
    entry = ZOO[name]
    inputs = [entry.inputs(rows, 9) if name != "mlp" else entry.inputs(rows) for rows in (2, 3)]
    program = capture(entry.model(), inputs[0])
    return dataclasses.replace(program, calibration=(inputs * batches)[:batches])


@pytest.fixture(scope="module")
def trained() -> Program:
    return PassManager([TrainElastic(**QUICK, learning_rate=0.01)])(calibrated("llama")).program


def dense_weights(program: Program) -> dict[str, torch.Tensor]:
    return {n.name: n.weight(program).detach().clone() for n in find_linears(program)}


def test_weights_stay_and_the_program_computes_what_it_did(trained: Program) -> None:
    before = calibrated("llama")
    for name, weight in dense_weights(before).items():
        assert torch.equal(weight, dense_weights(trained)[name]), name
    batch = before.calibration[0]
    for name, value in before.run(batch).items():
        assert torch.equal(value, trained.run(batch)[name])
    assert SparseWeights not in trained.facts


@pytest.mark.parametrize("checks", [True, False])
def test_materialised_equals_the_elastic_forward(trained: Program, checks: bool) -> None:
    if not checks:  # Then the lowest group has adapters, whatever they are worth.
        step = TrainElastic(**QUICK, learning_rate=0.01, check_lowest=False)
        trained = PassManager([step])(calibrated("llama")).program
    elastic = trained.fact(Elastic)
    compared = []
    linears = find_linears(trained)
    stage = ElasticStage(trained, linears, elastic)
    batch = trained.calibration[0]
    for threshold in (64, 128, 160):
        sparsity = threshold / LEVELS
        made = PassManager([MaterializeElastic(sparsity)])(trained).program
        group = elastic.group(sparsity)
        lowest = group == 0 and not all(e.serves_lowest for e in elastic.linears.values())
        found = {}
        for name in elastic.linears:
            keep = made.fact(SparseWeights).masks[name].keep()
            width = keep.shape[1]
            # Levels prune ceil(t n / 256) of a row, patterns floor(p n): the same where that is whole.
            if threshold * width % LEVELS == 0:
                assert torch.equal(keep, elastic.linears[name].levels >= threshold), name
            found[name] = threshold * width % LEVELS == 0
        if lowest or not all(found.values()):
            continue
        with torch.no_grad():
            expected = stage.run(batch, threshold, group)
        for name, value in made.run(batch).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
        compared.append(group)
    assert set(compared) >= ({1} if checks else {0, 1})


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.62, 0.7])
def test_counts_are_exact_and_masks_nested(trained: Program, sparsity: float) -> None:
    made = PassManager([MaterializeElastic(sparsity)])(trained).program
    above = PassManager([MaterializeElastic(0.7)])(trained).program
    for name, mask in made.fact(SparseWeights).masks.items():
        keep = mask.keep()
        assert torch.equal(keep, Unstructured(sparsity).project(keep.float() + 0.0)), name
        assert not (above.fact(SparseWeights).masks[name].keep() & ~keep).any()
    masks = made.fact(SparseWeights).masks
    for linear in find_linears(made):
        if linear.name in masks:
            assert not linear.weight(made)[~masks[linear.name].keep()].any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
def test_without_adapters_it_is_wanda(trained: Program, sparsity: float) -> None:
    elastic = trained.fact(Elastic)
    bare = {
        name: dataclasses.replace(found, up=torch.zeros_like(found.up))
        for name, found in elastic.linears.items()
    }
    program = trained.with_fact(dataclasses.replace(elastic, linears=bare))
    made = PassManager([MaterializeElastic(sparsity)])(program).program
    # One stage's statistics of the dense stream: those of the whole dense program.
    dense = calibrated("llama")
    statistics = Observe().run(dense).fact(Statistics)
    for linear in find_linears(dense):
        if linear.name not in elastic.linears:
            continue
        weight = linear.weight(dense)
        scores = weight.abs() * statistics.of(linear.name).root_mean_square()
        expected = weight * Unstructured(sparsity).project(scores)
        assert torch.equal(linear.weight(made), expected), linear.name


def test_sparsity_zero_gives_the_input_bit_for_bit(trained: Program) -> None:
    made = PassManager([MaterializeElastic(0.0)])(trained).program
    for name, weight in dense_weights(trained).items():
        assert torch.equal(weight, dense_weights(made)[name])


def test_training_helps_at_every_sparsity_of_the_range() -> None:
    program = calibrated("llama", 8)
    steps = [TrainElastic(groups=(0.5, 0.7), rank=8, epochs=12, learning_rate=0.01)]
    found = PassManager(steps)(program).program
    elastic = found.fact(Elastic)
    none = {
        n: dataclasses.replace(e, up=torch.zeros_like(e.up)) for n, e in elastic.linears.items()
    }
    plain = found.with_fact(dataclasses.replace(elastic, linears=none))

    def error(of: Program, sparsity: float) -> float:
        made = PassManager([MaterializeElastic(sparsity)])(of).program
        total = 0.0
        for batch in program.calibration:
            wanted, given = program.run(batch)["logits"], made.run(batch)["logits"]
            total += float((given - wanted).norm() / wanted.norm())
        return total

    for sparsity in (0.45, 0.6, 0.7):
        assert error(found, sparsity) < 0.9 * error(plain, sparsity), sparsity


def test_n_of_m_family() -> None:
    program = calibrated("llama")
    step = TrainElastic(groups=(0.5, 0.75), family="8", rank=2, epochs=1)
    found = PassManager([step])(program).program
    made = PassManager([MaterializeElastic(0.75)])(found).program
    masks = made.fact(SparseWeights).masks
    assert masks
    assert {mask.pattern for mask in masks.values()} == {NM(2, 8)}
    with pytest.raises(PatternError, match="no n:8 pattern"):
        PassManager([MaterializeElastic(0.6)])(found)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "mixtral", "gemma3", "vit"])
@pytest.mark.filterwarnings("ignore:.*by magnitude")
def test_other_architectures(name: str) -> None:
    entry = ZOO[name]
    batches = [entry.inputs(rows) for rows in (2, 3)]
    program = dataclasses.replace(capture(entry.model(), batches[0]), calibration=batches)
    found = PassManager([TrainElastic(groups=(0.5, 0.7), rank=2, epochs=1)])(program).program
    made = PassManager([MaterializeElastic(0.6)])(found).program
    masks = made.fact(SparseWeights).masks
    assert set(masks) == {linear.name for linear in find_linears(program) if linear.name in masks}
    assert masks
    assert all(
        value.isfinite().all()
        for value in made.run(batches[1]).values()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("mixer", ["mixed", "drawn", "dense"])
@pytest.mark.parametrize("hierarchy", ["nested", "shared", "independent"])
def test_ablations_run_and_differ(mixer: str, hierarchy: Any) -> None:
    step = TrainElastic(**QUICK, mixer=mixer, hierarchy=hierarchy)
    found = PassManager([step])(calibrated("llama")).program.fact(Elastic)
    assert found.hierarchy == hierarchy
    assert any(linear.up.any() for linear in found.linears.values())


def test_the_same_seed_gives_the_same_bytes() -> None:
    results = [
        PassManager([TrainElastic(**QUICK, seed=seed)])(calibrated("llama")).program.fact(Elastic)
        for seed in (0, 0, 1)
    ]
    name = next(iter(results[0].linears))
    assert torch.equal(results[0].linears[name].up, results[1].linears[name].up)
    assert not torch.equal(results[0].linears[name].down, results[2].linears[name].down)


def test_the_mixture_enters_the_next_stage() -> None:
    """Later stages are trained on another stream under another mixer; the first is not."""
    found = {
        mixer: PassManager([TrainElastic(**QUICK, mixer=mixer)])(calibrated("llama")).program
        for mixer in ("mixed", "dense")
    }
    ups = {k: {n: e.up for n, e in p.fact(Elastic).linears.items()} for k, p in found.items()}
    layers = [[n for n in ups["dense"] if f"layers.{layer}." in n] for layer in (0, 1)]
    assert all(torch.equal(ups["mixed"][n], ups["dense"][n]) for n in layers[0])
    assert not any(torch.equal(ups["mixed"][n], ups["dense"][n]) for n in layers[1])


def test_draws_cover_each_group_and_stay_within() -> None:
    elastic = Elastic((0.4, 0.45, 0.7))
    generator = torch.Generator().manual_seed(0)
    for group, (low, high) in enumerate([(0, 0.4), (0.4, 0.45), (0.45, 0.7)]):
        drawn = draw_thresholds(elastic, group, 200, generator)
        assert all(low < t / LEVELS <= high for t in drawn)
        assert set(drawn) == set(thresholds_of(elastic, group)), "one from each part"


def test_shares_are_those_of_the_paper() -> None:
    groups = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
    assert share_groups(groups) == [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    assert sum(share_groups((0.3, 0.8))) == pytest.approx(1)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": ()},
        {"groups": (0.5, 0.5)},
        {"groups": (0.5, 1.0)},
        {"rank": 0},
        {"family": "3"},
        {"family": "columns"},
        {"epochs": 0},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"groups": 0.5},
        {"groups": ("a",)},
        {"groups": (0.001,)},
        {"rank": 2.5},
        {"hierarchy": "flat"},
        {"mixer": "none"},
        {"loss": "mean"},
        {"held_out": 1.0},
        {"family": "8", "groups": (0.1, 0.5)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        TrainElastic(**options)


def test_quick_is_less_work_of_the_same_kind() -> None:
    quick = TrainElastic.quick(rank=2, epochs=1)
    assert (quick.rank, quick.epochs, quick.hierarchy, quick.mixer) == (2, 1, "nested", "mixed")
    work = [step.epochs * len(step.groups) for step in (TrainElastic.quick(), TrainElastic())]
    assert work[0] <= work[1] / 10
    found = PassManager([quick])(calibrated("llama")).program.fact(Elastic)
    assert found.groups == (0.5, 0.6, 0.7)


def test_refusals() -> None:
    with pytest.raises(CalibrationError):
        PassManager([TrainElastic(**QUICK)])(
            dataclasses.replace(small_program("llama"), calibration=())
        )
    program = calibrated("llama")
    pruned = PassManager([PruneMagnitude("50%"), ApplyMasks()])(program).program
    with pytest.raises(RequirementError, match="comes with it already"):
        PassManager([TrainElastic(**QUICK)])(pruned)
    steps = [PruneMagnitude("50%"), ApplyMasks(), TrainElastic(**QUICK)]
    with pytest.raises(RequirementError, match="apply-masks comes before it"):
        PassManager(steps)(program)
    with pytest.raises(RecipeError, match=r"sparsity='0\.5'"):
        MaterializeElastic("0.5")  # type: ignore[arg-type]
    with pytest.raises(RequirementError, match="train-elastic"):
        PassManager([MaterializeElastic(0.5)])(program)


def test_a_family_is_a_number_or_its_text() -> None:
    assert TrainElastic(family=8, groups=(0.5, 0.75)) == TrainElastic(  # type: ignore[arg-type]
        family="8", groups=(0.5, 0.75)
    )


def test_a_width_that_m_does_not_divide_is_refused_before_anything_runs() -> None:
    program = calibrated("mlp")
    widths = [linear.in_features for linear in find_linears(program)]
    assert any(width % 32 for width in widths)
    with pytest.raises(PatternError, match="n:32 does not fit a width of") as caught:
        PassManager([TrainElastic(family="32", groups=(0.5, 0.75))])(program)
    assert caught.value.where in {linear.name for linear in find_linears(program)}
    assert "exclude=" in str(caught.value)


def test_two_passes_over_different_linears_share_their_groups() -> None:
    first = TrainElastic(**QUICK, include=("*q_proj",))
    program = PassManager([first])(calibrated("llama")).program
    same = TrainElastic(**QUICK, include=("*k_proj",))
    both = PassManager([same])(program).program.fact(Elastic)
    assert len(both.linears) == 2 * len(program.fact(Elastic).linears)
    other = dataclasses.replace(same, groups=(0.3, 0.4, 0.6))
    for steps, start in (([other], program), ([first, other], calibrated("llama"))):
        with pytest.raises(RequirementError, match="elastic already, with groups"):
            PassManager(steps)(start)


def test_training_that_diverges_says_so() -> None:
    step = TrainElastic(**QUICK, learning_rate=1e30)
    with pytest.raises(CompileError, match="training diverged") as caught:
        PassManager([step])(calibrated("llama"))
    assert "learning_rate below 1e+30" in str(caught.value)


def test_a_sparsity_that_was_not_trained_is_refused_before_anything_runs(trained: Program) -> None:
    with pytest.raises(PatternError, match=r"0.8 is outside \[0, 0.7\]"):
        PassManager([MaterializeElastic(0.8)])(trained)


def test_after_it_a_pruner_can_still_run(trained: Program) -> None:
    made = PassManager([Observe(), PruneWanda("50%"), ApplyMasks()])(trained).program
    assert SparseWeights in made.facts
