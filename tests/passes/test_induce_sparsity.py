"""induce-sparsity: that learned scales are exact, that they help, and what is done where they do not."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kept_traces import capture_once as capture
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip.ir.errors import CalibrationError, CompileError, PatternError
from zeroskip.ir.folding import FoldedScales, fold_groups
from zeroskip.ir.induction import Induced, Induction, Objective
from zeroskip.ir.linears import find_linears
from zeroskip.ir.matrix_norms import PowerIteration, frobenius_norm, largest_column_sum
from zeroskip.ir.medians import medians_and_means
from zeroskip.ir.patterns import Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.ir.score_refresh import refreshed_diagonal, refreshed_scores
from zeroskip.ir.selection import select_linears
from zeroskip.ir.shift_folding import fold_shift, why_not_shifted
from zeroskip.ir.stage_error import StageError
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.straight_through import find_thresholds, straight_through
from zeroskip.passes import (
    ApplyMasks,
    FindScaleGroups,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    SteerScores,
    scale_learning,
)
from zeroskip.passes.base import TOLERANCES, measure_drift, relative_drift
from zeroskip.passes.induce_sparsity import InduceSparsity

ARCHITECTURES = ("llama", "opt", "gemma2", "mixtral", "gpt2", "qwen3")
LAYER = "model.layers.0."
QUERY_KEY = f"{LAYER}self_attn.k_proj.weight -> {LAYER}self_attn.q_proj.weight"


@functools.cache
def program_of(name: str, dtype: torch.dtype = torch.float32, batches: int = 4) -> Program:
    """A model whose activations have channels of very different sizes, and calibration for it."""
    entry = ZOO[name]
    model = entry.model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                sizes = (1.2 * torch.randn(parameter.shape, generator=generator)).exp()
                offset = 1.0 if name == "gemma2" else 0.0  # its gains are read as 1 + w
                parameter.copy_(sizes - offset)
    program = capture(model.to(dtype), entry.inputs())
    calibration = tuple(entry.inputs(2, 11 + n, padded=n == 1) for n in range(batches))
    program = dataclasses.replace(program, calibration=calibration)
    return FindScaleGroups()(program).program


def induced(program: Program, **options: object) -> Program:
    step = InduceSparsity(**options)  # type: ignore[arg-type]
    return PassManager([step])(program).program


def pruned_error(program: Program, steps: Sequence[Pass]) -> float:
    """How far the outputs of a program move when it is pruned, on the example inputs."""
    dense = program.run(program.example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = PassManager([*steps, ApplyMasks()])(program).program
    found = pruned.run(program.example_inputs)
    return max(relative_drift(dense[name], found[name]) for name in dense)


def outcomes(program: Program) -> list[tuple[float, float, bool]]:
    found = []
    for outcome in program.fact(Induced).outcomes.values():
        assert outcome.before is not None
        assert outcome.after is not None
        found.append((outcome.before, outcome.after, outcome.kept))
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_program_computes_what_it_did(name: str) -> None:
    program = program_of(name)
    result = induced(program, epochs=1, guard=False)
    folded = result.fact(FoldedScales)
    assert folded.folds
    assert folded.refused == {}
    assert measure_drift(program, result) <= TOLERANCES[torch.float32]
    others = ZOO[name].inputs(*ZOO[name].sizes[1])
    assert measure_drift(program, result, others) <= TOLERANCES[torch.float32]
    moved = [n for n in program.weights if not torch.equal(program.weights[n], result.weights[n])]
    assert moved


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_pruning_by_magnitude_errs_less(name: str, pattern: str) -> None:
    program = program_of(name)
    plain = pruned_error(program, [PruneMagnitude(pattern)])
    ours = pruned_error(program, [InduceSparsity(pattern), PruneMagnitude(pattern)])
    assert ours < 0.85 * plain


def test_training_improves_on_where_it_started() -> None:
    program = program_of("llama", batches=8)
    before = outcomes(induced(program, epochs=0))
    after = outcomes(induced(program, epochs=6, learning_rate=0.02))
    assert [kept for *_, kept in before] == [kept for *_, kept in after] == [True] * len(after)
    start, end = (sum(error for _, error, _ in found) for found in (before, after))
    assert end < 0.97 * start


# F3: a scale commutes with a mask. Below, scales are folded into all members of a group under
# autograd, and the stage is run as it would run folded: an independent computation.


def float64_stage(name: str) -> tuple[Program, list[ScaleGroup]]:
    entry = ZOO[name]
    program = capture(
        entry.model(dtype=torch.float64),
        {n: v.double() if v.is_floating_point() else v for n, v in entry.inputs().items()},
    )
    program = dataclasses.replace(program, calibration=(entry.inputs(2, 11),))
    program = FindScaleGroups()(program).program
    names = {linear.name for linear in select_linears(program)}
    groups = program.fact(ScaleGroups).groups.values()
    return program, [g for g in groups if not names.isdisjoint(g.linears)]


def folded_error(
    program: Program,
    groups: Sequence[ScaleGroup],
    logs: dict[str, Tensor],
    *,
    soft: bool,
    consumers_only: bool = False,
) -> Tensor:
    """The error of the stage with scales folded into its parameters and masks on top."""
    parameters = {name: program.weights[name].detach().double() for name in program.weights}
    for group in groups:
        scales = logs[group.name].exp()
        for member in group.members:
            if consumers_only and int(member.exponents.max()) <= 0:
                continue
            value = parameters[member.parameter]
            factors = member.factors(scales, value.dim())
            value = (member.slope * value + member.offset) * factors
            parameters[member.parameter] = (value - member.offset) / member.slope
    pattern = Unstructured(0.5)
    for linear in select_linears(program):
        weight = linear.view(parameters[linear.parameter])
        assert linear.expert is None
        keep = pattern.project(weight.detach().abs())
        mask: Tensor = keep
        if soft:
            scores = weight.abs().log()
            mask = straight_through(
                scores, keep, find_thresholds(scores, keep, pattern), pattern, 0.2
            )
        masked = weight * mask
        parameters[linear.parameter] = masked.T if linear.transposed else masked
    with StageError(program) as error, torch.enable_grad():
        return error(0, parameters)


def random_logs(groups: Sequence[ScaleGroup]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        g.name: torch.randn(g.size, generator=generator, dtype=torch.float64)
        .mul(0.5)
        .requires_grad_()
        for g in groups
    }


def gradients(error: Tensor, logs: dict[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(error, list(logs.values()), allow_unused=True)
    return torch.cat(
        [torch.zeros(len(v)) if g is None else g for g, v in zip(found, logs.values(), strict=True)]
    )


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_hard_masks_give_scales_no_gradient(name: str) -> None:
    program, groups = float64_stage(name)
    logs = random_logs(groups)
    hard = gradients(folded_error(program, groups, logs, soft=False), logs)
    soft = gradients(folded_error(program, groups, logs, soft=True), logs)
    one_side = folded_error(program, groups, logs, soft=False, consumers_only=True)
    assert float(soft.norm()) > 0
    # Each side of a fold has a gradient; the two cancel, to the rounding of the loss.
    assert float(hard.norm()) < 1e-5 * float(gradients(one_side, logs).norm())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_gradient_is_that_of_the_folded_stage(name: str) -> None:
    program, groups = float64_stage(name)
    logs = random_logs(groups)
    expected = gradients(folded_error(program, groups, logs, soft=True), logs)
    floats = {n: v.detach().float().requires_grad_() for n, v in logs.items()}
    objective = Objective(Unstructured(0.5), None, False, 0.2, 1, 0.0, 0.0, 2.0, 0)
    with StageError(program) as error, torch.enable_grad():
        induction = Induction(program, error, select_linears(program), groups, objective)
        found = gradients(induction.loss(0, floats, {}), floats)
    assert relative_drift(expected, found.double()) < 1e-3


def test_a_literal_objective_moves_scales_by_its_regulariser_alone() -> None:
    program, groups = float64_stage("opt")
    logs = {g.name: torch.zeros(g.size, requires_grad=True) for g in groups}
    shifts = {g.name: torch.zeros(g.size, requires_grad=True) for g in groups if g.shifts}
    assert shifts
    for weight in (0.0, 1.0):
        objective = Objective(Unstructured(0.5), None, True, 0.2, 1, weight, 0.0, 2.0, 0)
        with StageError(program) as error, torch.enable_grad():
            induction = Induction(program, error, select_linears(program), groups, objective)
            assert bool(gradients(induction.loss(0, logs, shifts), shifts).any())
            assert bool(gradients(induction.loss(0, logs, shifts), logs).any()) == bool(weight)


# The guard.


def test_harmful_scales_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("llama")

    def plant(
        induction: object,
        batches: object,
        logs: dict[str, Tensor],
        shifts: object,
        schedule: object,
    ) -> object:
        generator = torch.Generator().manual_seed(0)
        groups = program.fact(ScaleGroups).groups
        return {n: 2 * torch.randn(groups[n].size, generator=generator) for n in logs}, shifts

    monkeypatch.setattr(scale_learning, "_train", plant)
    result = induced(program, init="ones")
    fact = result.fact(FoldedScales)
    assert fact.folds == {}
    assert fact.refused.keys() == result.fact(Induced).outcomes.keys()
    assert all("pruning errs by" in reason for reason in fact.refused.values())
    assert all(after >= before and not kept for before, after, kept in outcomes(result))
    for name in program.weights:
        assert torch.equal(program.weights[name], result.weights[name])
    # Without the guard they are folded.
    assert induced(program, init="ones", guard=False).fact(FoldedScales).folds


def test_what_training_started_from_is_kept_where_training_does_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = program_of("llama")
    start = induced(program, epochs=0)

    def plant(
        induction: object,
        batches: object,
        logs: dict[str, Tensor],
        shifts: object,
        schedule: object,
    ) -> object:
        return {n: -v for n, v in logs.items()}, shifts

    monkeypatch.setattr(scale_learning, "_train", plant)
    found = induced(program)
    for name in program.weights:
        assert torch.equal(start.weights[name], found.weights[name])


@pytest.mark.parametrize(
    ("count", "share", "seen", "judging"),
    [(8, 0.25, 6, [6, 7]), (4, 0.9, 1, [1, 2, 3]), (2, 0.1, 1, [1]), (1, 0.25, 1, [0])],
)
def test_what_judges_was_not_learned_from(
    count: int, share: float, seen: int, judging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of("llama", batches=count)
    trained_on: list[int] = []
    judged_on: list[int] = []
    train, error = scale_learning._train, Induction.error

    def training(induction: Induction, batches: Sequence[int], *rest: object) -> object:
        trained_on.extend(batches)
        return train(induction, batches, *rest)  # type: ignore[arg-type]

    def judging_by(
        self: Induction, index: int, logs: dict[str, Tensor], shifts: dict[str, Tensor]
    ) -> Tensor:
        if not torch.is_grad_enabled():
            judged_on.append(index)
        return error(self, index, logs, shifts)

    monkeypatch.setattr(scale_learning, "_train", training)
    monkeypatch.setattr(Induction, "error", judging_by)
    InduceSparsity(epochs=1, held_out=share)(program)
    assert trained_on == list(range(seen))
    assert sorted(set(judged_on)) == judging


# The paper as published.


def test_literal_runs_and_its_shifts_are_exact() -> None:
    program = program_of("opt")
    result = induced(program, literal=True, guard=False, epochs=2)
    assert measure_drift(program, result) <= TOLERANCES[torch.float32]
    biases = [n for n in program.weights if n.endswith("layer_norm.bias")]
    without = induced(program, literal=True, guard=False, epochs=2, shift=False)
    shifted = [n for n in biases if not torch.equal(result.weights[n], without.weights[n])]
    assert shifted


@pytest.mark.parametrize("name", ["opt", "gpt2", "mlp"])
def test_a_shift_folds_exactly(name: str) -> None:
    entry = ZOO[name]
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in entry.inputs().items()}
    program = FindScaleGroups()(capture(entry.model(dtype=torch.float64), inputs)).program
    linears = {linear.name: linear for linear in find_linears(program)}
    generator = torch.Generator().manual_seed(0)
    shifted, count = program, 0
    for group in program.fact(ScaleGroups).groups.values():
        if why_not_shifted(program, group, linears) is None:
            shift = torch.randn(group.size, generator=generator, dtype=torch.float64)
            shifted = fold_shift(shifted, group, shift, linears)
            count += 1
    assert count
    assert measure_drift(program, shifted) < TOLERANCES[torch.float64]
    assert any(not torch.equal(program.weights[n], shifted.weights[n]) for n in program.weights)


def test_a_shift_is_refused_where_a_bias_is_missing() -> None:
    program = program_of("llama")
    linears = {linear.name: linear for linear in find_linears(program)}
    for group in program.fact(ScaleGroups).groups.values():
        assert why_not_shifted(program, group, linears) is not None


def test_a_shift_drops_statistics_that_no_longer_hold() -> None:
    program = Observe()(program_of("opt")).program
    linears = {linear.name: linear for linear in find_linears(program)}
    group = next(g for g in program.fact(ScaleGroups).groups.values() if g.shifts)
    shifted = fold_shift(program, group, torch.ones(group.size), linears)
    gone = program.fact(Statistics).edges.keys() - shifted.fact(Statistics).edges.keys()
    assert gone == {consumer.linear for consumer in group.consumers}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_cached_refresh_is_a_fresh_observation_of_the_folded_stage(name: str) -> None:
    program = Observe()(program_of(name)).program
    generator = torch.Generator().manual_seed(3)
    groups = [g for g in program.fact(ScaleGroups).groups.values() if g.consumers]
    scales = {
        g.name: (torch.rand(g.size, generator=generator, dtype=torch.float64) * 2 - 1).exp()
        for g in groups
    }
    folded = fold_groups(program, [(g, scales[g.name]) for g in groups])
    fresh = Observe()(folded.without_facts([Statistics])).program.fact(Statistics)
    cached = program.fact(Statistics)
    linears = {linear.name: linear for linear in find_linears(program)}
    for group in groups:
        for consumer in group.consumers:
            if consumer.linear not in cached.edges or not cached.edges[consumer.linear].count:
                continue
            inside = consumer.channels >= 0
            factors = torch.ones(len(consumer.channels), dtype=torch.float64)
            factors[inside] = 1 / scales[group.name][consumer.channels[inside]]
            edge = cached.edges[consumer.linear]
            diagonal = edge.total_of_squares / edge.count
            expected = fresh.edges[consumer.linear]
            measured = expected.total_of_squares / expected.count
            torch.testing.assert_close(
                refreshed_diagonal(diagonal, factors), measured, rtol=1e-4, atol=1e-9
            )
            weight = linears[consumer.linear].weight(folded).double()
            torch.testing.assert_close(
                refreshed_scores(weight, diagonal, factors),
                weight.abs() * measured.sqrt(),
                rtol=1e-4,
                atol=1e-9,
            )


def test_medians_leave_padding_out() -> None:
    program = small_program("llama")
    linears = select_linears(program)
    found = medians_and_means(program, linears)
    statistics = Observe()(program).program.fact(Statistics)
    for linear in linears:
        median, mean = found[linear.name]
        torch.testing.assert_close(mean, statistics.edges[linear.name].mean())
        assert not torch.equal(median, mean)
    # The first linear reads what the norm gives for each token: computed again by hand.
    batch = dict(program.calibration[1])
    assert int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    doubled = {n: torch.cat([v, v]) for n, v in batch.items()}
    unpadded = dataclasses.replace(program, calibration=(batch, doubled))
    again = medians_and_means(unpadded, linears[:1])[linears[0].name]
    once = medians_and_means(dataclasses.replace(program, calibration=(batch,)), linears[:1])
    torch.testing.assert_close(again[0], once[linears[0].name][0])


# What surrounds it.


def test_it_is_deterministic() -> None:
    program = program_of("llama")
    first, second = (induced(program, epochs=2) for _ in range(2))
    for name in program.weights:
        assert torch.equal(first.weights[name], second.weights[name])
    other = induced(program, epochs=2, seed=1)
    assert any(not torch.equal(first.weights[n], other.weights[n]) for n in program.weights)


def test_queries_and_keys_are_tied_as_rotation_demands() -> None:
    program = program_of("llama")
    result = induced(program, epochs=2, guard=False)
    fold = result.fact(FoldedScales).folds[QUERY_KEY]
    assert bool((fold.scales != 1).any())
    head_dim, key_heads = 24, 2
    # A rotation mixes channel i with i + half: one scale for both, for each key head.
    assert len(fold.scales) == key_heads * head_dim // 2
    ratio = result.weights[f"{LAYER}self_attn.q_proj.weight"].double()
    q = f"{LAYER}self_attn.q_proj.weight"
    norm = f"{LAYER}input_layernorm.weight"
    # Divide the columns' scales out: what is left belongs to rows.
    columns = program.weights[norm].double() / result.weights[norm].double()
    rows = (ratio / program.weights[q].double() / columns).median(1).values
    halves = rows.reshape(-1, 2, head_dim // 2)
    torch.testing.assert_close(halves[:, 0], halves[:, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(halves[0], halves[1], rtol=1e-4, atol=0)  # same key head


def test_scales_are_normalised_and_bounded() -> None:
    result = induced(program_of("llama"), epochs=2, limit=1.5, learning_rate=0.3, guard=False)
    for fold in result.fact(FoldedScales).folds.values():
        assert float(fold.scales.max()) <= 1.5 * (1 + 1e-5)
        assert float(fold.scales.min()) >= 1 / 1.5 / (1 + 1e-5)
    free = induced(program_of("llama"), epochs=1, limit=1e6, guard=False)
    for fold in free.fact(FoldedScales).folds.values():
        assert abs(float(fold.scales.log().mean())) < 1e-5


@pytest.mark.parametrize("options", [{}, {"literal": True}])
def test_bfloat16(options: dict[str, object]) -> None:
    program = program_of("llama", torch.bfloat16)
    result = induced(program, epochs=1, guard=False, **options)
    assert result.fact(FoldedScales).folds
    assert result.weights[f"{LAYER}mlp.up_proj.weight"].dtype == torch.bfloat16
    assert measure_drift(program, result) <= TOLERANCES[torch.bfloat16]


def test_a_second_run_changes_nothing() -> None:
    program = program_of("llama")
    step = InduceSparsity(epochs=1)
    once = step(program)
    assert once.modified
    again = step(once.program)
    assert not again.modified


def test_a_program_without_groups_passes_through() -> None:
    program = small_program("mlp").with_fact(ScaleGroups({}))
    result = InduceSparsity()(program)
    assert result.program.fact(FoldedScales) == FoldedScales()
    assert result.drift is None
    for name in program.weights:
        assert torch.equal(program.weights[name], result.program.weights[name])


def test_a_live_model_is_not_touched() -> None:
    entry = ZOO["llama"]
    model = entry.model()
    program = dataclasses.replace(
        capture(model, entry.inputs()), calibration=(entry.inputs(2, 11), entry.inputs(2, 12))
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    induced(FindScaleGroups()(program).program, epochs=1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_nothing_is_learned_for_scores_that_scales_cancel_out_of(pattern: str, score: str) -> None:
    program = program_of("llama")
    result = InduceSparsity(pattern, score)(program)
    assert result.drift is None
    assert all("cancels out" in r for r in result.program.fact(FoldedScales).refused.values())
    assert all(o.before is None for o in result.program.fact(Induced).outcomes.values())


@pytest.mark.parametrize("pattern", ["0.5 matrix", "4:8", "block:8x8:0.5", "1:4 pad"])
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_every_pattern_and_score(pattern: str, score: str) -> None:
    program = program_of("llama")
    result = induced(program, pattern=pattern, score=score, epochs=1)
    assert result.fact(Induced).outcomes
    assert measure_drift(program, result) <= TOLERANCES[torch.float32]


def test_refusals() -> None:
    program = program_of("llama")
    bare = dataclasses.replace(program, calibration=())
    with pytest.raises(CalibrationError, match="no calibration data"):
        PassManager([InduceSparsity()])(bare)
    with pytest.raises(CalibrationError, match="no calibration data"):
        InduceSparsity()(bare)
    with pytest.raises(PatternError, match="by stage"):
        InduceSparsity("50% global")
    with pytest.raises(PatternError, match="does not fit"):
        PassManager([InduceSparsity("block:5x5:0.5")])(program)
    for options in ({"score": "luck"}, {"init": "luck"}, {"p": 3.0}):
        with pytest.raises(CompileError, match="there is no"):
            InduceSparsity(**options)  # type: ignore[arg-type]
    for unlearnable in ({"pattern": "0.5 matrix"}, {"literal": True}):
        with pytest.raises(CompileError, match="no scales to learn for SparseGPT"):
            InduceSparsity(score="sparsegpt", **unlearnable)  # type: ignore[arg-type]
    bad: list[dict[str, object]] = [{"epochs": -1}, {"learning_rate": 0.0}, {"temperature": 0.0}]
    bad += [{"limit": 0.5}, {"held_out": 1.0}, {"kappa": 0.0}, {"alpha": -1.0}]
    bad += [{"refresh": 0}]
    for options in [*bad, {"regularization": -1.0}]:
        with pytest.raises(CompileError, match="out of range"):
            InduceSparsity(**options)  # type: ignore[arg-type]


def test_warnings() -> None:
    magnitude, wanda = PruneMagnitude("2:4"), PruneWanda("2:4")
    assert InduceSparsity("2:4").warning([Observe(), magnitude]) is None
    assert InduceSparsity("2:4").warning([]) is None
    assert "changes nothing" in str(InduceSparsity("2:4").warning([wanda]))
    steered = [SteerScores("prune-wanda", "2:4"), wanda]
    assert InduceSparsity("2:4").warning(steered) is None
    assert "learns for 0.5" in str(InduceSparsity().warning([magnitude]))


# The pieces.


def test_straight_through_masks_have_hard_values_and_soft_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 16, generator=generator)
    for text in ("50%", "0.5 matrix", "2:4", "3:5 pad", "block:4x4:0.5"):
        pattern = parse_pattern(text)
        keep = pattern.project(scores.exp())
        leaf = scores.clone().requires_grad_()
        mask = straight_through(leaf, keep, find_thresholds(leaf, keep, pattern), pattern, 0.2)
        torch.testing.assert_close(mask.detach(), keep.float())
        (gradient,) = torch.autograd.grad(mask.sum(), leaf)
        assert float(gradient.min()) >= 0
        assert float(gradient.max()) > 0.1, text
    pattern, keep = Unstructured(0.0), torch.ones_like(keep)
    everything = straight_through(leaf, keep, find_thresholds(leaf, keep, pattern), pattern, 0.2)
    (gradient,) = torch.autograd.grad(everything.sum(), leaf)
    assert not gradient.any()


def test_norms_and_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    rows = torch.rand(12, generator=generator).add(0.5).requires_grad_()
    columns = torch.rand(20, generator=generator).add(0.5).requires_grad_()
    scaled = rows.unsqueeze(1) * weight * columns
    spectral = PowerIteration(weight, generator)
    for _ in range(200):
        found = spectral(rows, columns)
    pairs = [
        (found, torch.linalg.matrix_norm(scaled, 2)),
        (frobenius_norm(weight, rows, columns), scaled.norm()),
        (largest_column_sum(weight, rows, columns), torch.linalg.matrix_norm(scaled, 1)),
    ]
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=0)
        for leaf in (rows, columns):
            (mine,) = torch.autograd.grad(ours, leaf, retain_graph=True)
            (theirs,) = torch.autograd.grad(reference, leaf, retain_graph=True)
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
