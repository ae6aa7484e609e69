"""fold-scales: the scales of each method, exactness, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.kept_traces import capture_once as capture
from tests.small import small_model, small_program
from tests.zoo import VOCABULARY, ZOO, randomize
from zeroskip import compile_sparse
from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.folding import FoldedScales, Scaled
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.ir.selection import select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.weights import Masked, OnDisk
from zeroskip.passes import (
    ApplyMasks,
    FindScaleGroups,
    FoldScales,
    Observe,
    PassManager,
    PruneMagnitude,
    PruneSparseGPT,
    PruneWanda,
    QuantizeValues,
    SteerScores,
)
from zeroskip.passes.base import TOLERANCES, measure_drift
from zeroskip.passes.fold_scales import METHODS

# One of each kind of group; the groups themselves are tried on the whole zoo, by ir/test_scale_groups.
TRANSFORMERS = ["opt", "gemma2", "phi3", "mixtral"]
CHOOSING = [method for method in METHODS if method != "unfold"]
LAYER = "model.layers.0."
UP_DOWN = f"{LAYER}mlp.up_proj.weight -> {LAYER}mlp.down_proj.weight"
VALUES = f"{LAYER}self_attn.v_proj.weight -> {LAYER}self_attn.o_proj.weight"
NORM = f"{LAYER}input_layernorm.weight -> {LAYER}self_attn.q_proj.weight"


def known(program: Program, *, gram: bool = False) -> Program:
    """Returns a program that knows its groups and the statistics of its calibration data."""
    for step in (FindScaleGroups(), Observe(gram=gram)):
        program = step(program).program
    return program


def fold(program: Program, step: FoldScales) -> Program:
    return step(program).program


def equalizing(**options: object) -> FoldScales:
    """A method that needs no calibration."""
    return FoldScales("equalize", **options)  # type: ignore[arg-type]


def outputs_are_equal(first: Program, second: Program) -> bool:
    old, new = (program.run(program.example_inputs) for program in (first, second))
    return all(torch.equal(old[key], new[key]) for key in old)


def mean_of_one(scales: Tensor) -> Tensor:
    """A geometric mean of one, and no scale beyond 64."""
    return (scales / scales.log().mean().exp()).clamp(1 / 64, 64)


# The methods, each against its formula.


def scale_of_columns(before: Program, after: Program, linear: str) -> Tensor:
    """What the columns of a weight were multiplied by, float64 [in]."""
    old, new = (program.weights[linear].double() for program in (before, after))
    ratio = new / old
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
    return ratio[0]


def test_activation_is_the_root_mean_square_of_the_inputs() -> None:
    program = known(small_program("llama"))
    folded = fold(program, FoldScales("activation", include=("*mlp*",)))
    edge = program.fact(Statistics).edges[f"{LAYER}mlp.down_proj.weight"]
    expected = mean_of_one((edge.total_of_squares / edge.count).sqrt())
    found = scale_of_columns(program, folded, f"{LAYER}mlp.down_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(folded.fact(FoldedScales).folds[UP_DOWN].scales, expected)


def test_heads_that_share_a_value_share_its_scale() -> None:
    program = known(small_program("llama"))
    folded = fold(program, FoldScales("activation", include=("*o_proj",)))
    edge = program.fact(Statistics).edges[f"{LAYER}self_attn.o_proj.weight"]
    # Four query heads of 16 channels, the first two of which read the first value head.
    squares = edge.total_of_squares.view(2, 2, 16).mean(1, keepdim=True) / edge.count
    scales = mean_of_one(squares.sqrt().flatten()).view(2, 1, 16)
    found = scale_of_columns(program, folded, f"{LAYER}self_attn.o_proj.weight")
    torch.testing.assert_close(found, scales.expand(2, 2, 16).flatten(), rtol=1e-5, atol=0)


def test_smoothquant_weighs_activations_against_weights() -> None:
    program = known(small_program("llama"))
    folded = fold(program, FoldScales("smoothquant", alpha=0.3, include=("*q_proj",)))
    readers = [f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv"]
    weights = torch.cat([program.weights[name] for name in readers]).abs().amax(0).double()
    inputs = program.fact(Statistics).edges[readers[0]].abs_max.double()
    expected = mean_of_one(inputs**0.3 / weights**0.7)
    norm = program.weights[f"{LAYER}input_layernorm.weight"].double()
    found = norm / folded.weights[f"{LAYER}input_layernorm.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_equalize_gives_both_sides_the_same_range() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    folded = fold(program, equalizing(include=("*down_proj",)))
    up, down = (folded.weights[f"{LAYER}mlp.{x}_proj.weight"].abs() for x in ("up", "down"))
    ratio = up.amax(1) / down.amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_scales_are_bounded_and_dead_channels_get_the_lowest() -> None:
    program = known(small_program("llama"))
    down = f"{LAYER}mlp.down_proj.weight"
    edge = program.fact(Statistics).edges[down]
    squares = edge.total_of_squares.clone()
    squares[3], squares[5] = 0, 1e12
    edges = {down: dataclasses.replace(edge, total_of_squares=squares)}
    step = FoldScales("activation", limit=3.0, include=("*down_proj",))
    scales = fold(program.with_fact(Statistics(edges)), step).fact(FoldedScales).folds[UP_DOWN]
    assert scales.scales[3] == pytest.approx(1 / 3)
    assert scales.scales[5] == pytest.approx(3)
    rounded = dataclasses.replace(step, power_of_two=True)
    scales = fold(program.with_fact(Statistics(edges)), rounded).fact(FoldedScales).folds[UP_DOWN]
    assert set(scales.scales.tolist()) == {0.5, 1.0, 2.0}


# Exactness.


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_folds_are_exact(name: str, captured: Callable[[str], Program]) -> None:
    entry = ZOO[name]
    batch = entry.inputs(3, 11, padded=True)
    program = known(dataclasses.replace(captured(name), calibration=(batch,)))
    groups = program.fact(ScaleGroups).groups.values()
    offsets = {m.parameter: m.offset for g in groups for m in g.members if m.offset}
    assert bool(offsets) == (name in ("gemma2", "gemma3"))

    folded = fold(program, FoldScales("equalize", include=("*",)))
    assert folded.fact(FoldedScales).refused == {}
    assert folded.fact(FoldedScales).folds.keys() == {g.name for g in groups if g.linears}
    assert 0 < measure_drift(program, folded, entry.inputs(*entry.sizes[1], padded=True)) < 1e-5
    back = fold(folded, FoldScales("unfold"))
    assert back.fact(FoldedScales) == FoldedScales()
    for parameter, expected in program.weights.items():
        # Two roundings of half an ulp each; a gain 1 + w is rounded where w is.
        ulp = torch.finfo(expected.dtype).eps * (expected.abs() + offsets.get(parameter, 0))
        assert bool(((back.weights[parameter] - expected).abs() <= 1.5 * ulp).all()), parameter

    exact = fold(program, FoldScales(power_of_two=True))
    assert exact.fact(FoldedScales).refused == {}
    readers = {c.linear for g in groups for c in g.consumers}
    chosen = {linear.name for linear in select_linears(program)} & readers
    assert chosen <= {
        c.linear for g in groups for c in g.consumers if g.name in exact.fact(FoldedScales).folds
    }
    back = fold(exact, FoldScales("unfold"))
    if offsets:
        assert measure_drift(program, exact) < 1e-6
    else:
        assert outputs_are_equal(program, exact)
        assert all(torch.equal(back.weights[n], program.weights[n]) for n in program.weights)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_half_precision(name: str) -> None:
    entry = ZOO[name]
    program = capture(entry.model(dtype=torch.bfloat16), entry.inputs())
    program = known(dataclasses.replace(program, calibration=(entry.inputs(3, 11),)))
    folded = fold(program, FoldScales())
    assert folded.fact(FoldedScales).refused == {}
    assert 0 < measure_drift(program, folded) < TOLERANCES[torch.bfloat16]
    exact = fold(program, FoldScales(power_of_two=True))
    assert exact.fact(FoldedScales).refused == {}
    assert outputs_are_equal(program, exact) == (name != "gemma2")


def test_folding_twice_is_folding_once() -> None:
    program = known(small_program("llama"))
    for method in CHOOSING:
        once = FoldScales(method)(program)
        assert once.modified
        assert not FoldScales(method)(once.program).modified
    # The second method replaces the first.
    first = fold(fold(program, FoldScales("equalize")), FoldScales("smoothquant"))
    other = fold(program, FoldScales("smoothquant"))
    for name, each in other.fact(FoldedScales).folds.items():
        found = first.fact(FoldedScales).folds[name].scales
        torch.testing.assert_close(found, each.scales, rtol=1e-5, atol=0)


def test_weights_in_several_groups_are_rounded_once() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    folded = fold(program, equalizing())
    folds = {name: each.scales for name, each in folded.fact(FoldedScales).folds.items()}
    keys = next(n for n in folds if n.endswith("q_proj.weight") and "k_proj" in n)
    (query,) = [
        m
        for m in program.fact(ScaleGroups).groups[keys].members
        if m.parameter.endswith("q_proj.weight")
    ]
    rows = folds[keys][query.channels] ** query.exponents.double()
    weight = program.weights[f"{LAYER}self_attn.q_proj.weight"].double()
    expected = (weight * folds[NORM] * rows[:, None]).float()
    assert torch.equal(folded.weights[f"{LAYER}self_attn.q_proj.weight"], expected)


def test_experts_have_scales_of_their_own_and_the_router_follows() -> None:
    program = known(small_program("moe"))
    folded = fold(program, FoldScales())
    assert folded.fact(FoldedScales).refused == {}
    experts = f"{LAYER}mlp.experts."
    down = [folded.weights[f"{experts}down_proj"], program.weights[f"{experts}down_proj"]]
    ratios = (down[0] / down[1])[:, 0]
    assert not torch.allclose(ratios[0], ratios[1], rtol=0.1)
    statistics = program.fact(Statistics).edges
    inputs = statistics[f"{experts}down_proj[2]"]
    relative = inputs.root_mean_square() / ratios[2]
    torch.testing.assert_close(relative, relative[:1].expand_as(relative), rtol=1e-4, atol=0)
    router = f"{LAYER}mlp.gate.weight"
    scale = (folded.weights[router] / program.weights[router])[0]
    norm = f"{LAYER}post_attention_layernorm.weight"
    torch.testing.assert_close(scale * folded.weights[norm], program.weights[norm])


def test_statistics_are_those_of_the_folded_program() -> None:
    for name in ("llama", "moe", "gpt2"):
        folded = fold(known(small_program(name), gram=True), FoldScales())
        divided = folded.fact(Statistics).edges
        fresh = Observe(gram=True)(folded).program.fact(Statistics).edges
        assert divided.keys() == fresh.keys()
        for linear, edge in fresh.items():
            found = divided[linear]
            assert found.count == edge.count
            noise = edge.total_of_squares.sqrt().max() * 1e-4
            torch.testing.assert_close(found.total, edge.total, rtol=1e-4, atol=float(noise))
            torch.testing.assert_close(
                found.total_of_squares, edge.total_of_squares, rtol=1e-4, atol=0
            )
            torch.testing.assert_close(found.abs_max, edge.abs_max, rtol=1e-4, atol=0)
            assert edge.gram is not None
            size = float(edge.gram.abs().max())
            torch.testing.assert_close(found.gram, edge.gram, rtol=1e-4, atol=1e-5 * size)


def test_linears_that_share_an_edge_go_on_sharing_it() -> None:
    edges = fold(known(small_program("llama")), FoldScales()).fact(Statistics).edges
    first, *rest = (edges[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv")
    assert all(edge is first for edge in rest)


# What pruners make of it.


def masks_of(program: Program, *passes: object) -> dict[str, Tensor]:
    found = PassManager(passes)(program).program.fact(Masks).masks  # type: ignore[arg-type]
    return {name: mask.keep() for name, mask in found.items()}


@pytest.mark.parametrize(("name", "shared"), [("opt", "none"), ("llama", "o_proj")])
def test_magnitude_then_chooses_what_wanda_does(
    name: str, shared: str, captured: Callable[[str], Program]
) -> None:
    program = dataclasses.replace(captured(name), calibration=(ZOO[name].inputs(4, 9),))
    dense = known(program)
    folded = fold(dense, FoldScales(limit=1e9))
    for pattern in ("50%", "2:4"):
        wanda = masks_of(dense, PruneWanda(pattern))
        magnitude = masks_of(dense, PruneMagnitude(pattern))
        after = masks_of(folded, PruneMagnitude(pattern))
        for linear, expected in wanda.items():
            assert not torch.equal(magnitude[linear], expected), linear
            # Values that several heads read have one scale.
            assert torch.equal(after[linear], expected) == (shared not in linear), linear


@pytest.mark.parametrize("method", CHOOSING)
def test_wanda_chooses_the_same_whatever_is_folded(method: str) -> None:
    program = small_program("llama")
    for pattern in ("50%", "2:4"):
        alone = masks_of(program, Observe(), PruneWanda(pattern))
        with pytest.warns(UserWarning, match="changes nothing that prune-wanda decides"):
            after = masks_of(
                program, FindScaleGroups(), Observe(), FoldScales(method), PruneWanda(pattern)
            )
        assert all(torch.equal(after[name], alone[name]) for name in alone)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_sparsegpt_keeps_the_same_whatever_is_folded(damping: float) -> None:
    program = small_program("llama")
    # A Gram matrix is factorised without damping if there are more tokens than channels.
    batches = tuple(ZOO["llama"].inputs(8, 24 + n) for n in range(4))
    program = dataclasses.replace(program, calibration=batches)
    only = ("*q_proj", "*gate_proj", "*down_proj")
    pruner = PruneSparseGPT("2:4", damping=damping, include=only)
    alone = masks_of(program, Observe(gram=True), pruner)
    folds = (FindScaleGroups(), Observe(gram=True), FoldScales(power_of_two=True))
    with pytest.warns(UserWarning, match="changes nothing that prune-sparsegpt decides"):
        after = masks_of(program, *folds, pruner)
    assert len(alone) == 3
    assert all(torch.equal(after[name], alone[name]) for name in alone)
    if damping:
        # Where nobody knows of the folds any more, damping is that of the divided inputs.
        folded = PassManager(folds)(program).program.without_facts({FoldedScales})
        assert any(not torch.equal(masks_of(folded, pruner)[n], alone[n]) for n in alone)


def test_scores_that_are_steered_feel_what_scales_rows() -> None:
    program = small_program("llama")
    steered = (Observe(gram=True), SteerScores("prune-wanda", "2:4", steps=4), PruneWanda("2:4"))
    alone = masks_of(program, *steered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It would not be true that nothing changes.
        folding = (steered[0], FoldScales(power_of_two=True), *steered[1:])
        after = masks_of(program, FindScaleGroups(), *folding)
    changed = {name for name in alone if not torch.equal(after[name], alone[name])}
    # Values and the upper half of the MLP: their outputs are inputs of others.
    assert changed == {f"{LAYER}{part}_proj.weight" for part in ("self_attn.v", "mlp.up")}


def test_what_a_fold_does_change_is_not_warned_of() -> None:
    program = small_program("llama")
    folding = (FindScaleGroups(), Observe(), FoldScales())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks_of(program, *folding, PruneMagnitude(), PruneWanda())
        masks_of(program, *folding, PruneWanda("50% matrix"))
        masks_of(program, *folding, PruneWanda("block:4x4:0.5"))
        masks_of(program, FindScaleGroups(), Observe(), FoldScales("unfold"), PruneWanda())


def test_zeros_stay_where_they_are() -> None:
    program = PassManager([PruneMagnitude("2:4"), ApplyMasks(), FindScaleGroups()])(
        small_program("llama")
    ).program
    folded = fold(program, equalizing())
    assert folded.fact(FoldedScales).folds
    for name, mask in folded.fact(SparseWeights).masks.items():
        assert isinstance(folded.weights.source(name), Masked)
        assert torch.equal(folded.weights[name] != 0, mask.keep())
        assert torch.equal(program.weights[name] != 0, mask.keep())


def test_rounded_weights_are_left_alone() -> None:
    steps = [PruneMagnitude(include=("*mlp*",)), ApplyMasks(), QuantizeValues("bfloat16")]
    program = PassManager([*steps, FindScaleGroups()])(small_program("llama")).program
    fact = fold(program, equalizing()).fact(FoldedScales)
    assert "already rounded to bfloat16" in fact.refused[UP_DOWN]
    assert f"{LAYER}mlp." in fact.refused[UP_DOWN]
    assert VALUES in fact.folds


# Wrong groups, and scales that cannot be.


def without(program: Program, group: str, parameter: str) -> Program:
    """Returns a program whose fact forgets a member of a group."""
    fact = program.fact(ScaleGroups)
    members = [m for m in fact.groups[group].members if m.parameter != parameter]
    assert len(members) < len(fact.groups[group].members)
    damaged = dataclasses.replace(fact.groups[group], members=tuple(members))
    return program.with_fact(dataclasses.replace(fact, groups={**fact.groups, group: damaged}))


@pytest.mark.parametrize(
    ("group", "member"),
    [
        (UP_DOWN, f"{LAYER}mlp.up_proj.weight"),
        (NORM, f"{LAYER}self_attn.v_proj.weight"),
        (VALUES, f"{LAYER}self_attn.o_proj.weight"),
    ],
)
def test_a_wrong_group_is_left_alone_and_the_others_are_folded(group: str, member: str) -> None:
    program = without(known(small_program("llama")), group, member)
    for step in (FoldScales(), FoldScales(power_of_two=True), FoldScales(scales=draw(program))):
        folded = fold(program, step)
        fact = folded.fact(FoldedScales)
        assert list(fact.refused) == [group]
        assert "scales do not cancel" in fact.refused[group]
        assert {UP_DOWN, NORM, VALUES} - {group} == set(fact.folds) & {UP_DOWN, NORM, VALUES}
        others = {name: each.scales for name, each in fact.folds.items()}
        right = fold(program, FoldScales(scales=others))
        assert right.fact(FoldedScales).refused == {}
        for name in right.weights:
            assert torch.equal(folded.weights[name], right.weights[name])


def draw(program: Program) -> dict[str, Tensor]:
    """Returns scales for every group of a program."""
    groups = program.fact(ScaleGroups).groups.values()
    generator = torch.Generator().manual_seed(3)
    return {g.name: torch.rand(g.size, generator=generator) + 0.5 for g in groups}


def test_a_wrong_group_that_rounding_would_hide_is_found() -> None:
    # A block that adds little to its residual stream, in bfloat16.
    entry = ZOO["llama"]
    program = capture(entry.model(dtype=torch.bfloat16), entry.inputs())
    down = f"{LAYER}mlp.down_proj.weight"
    program = program.with_weights({down: program.weights[down] * 2**-9})
    program = FindScaleGroups()(program).program
    damaged = without(program, UP_DOWN, f"{LAYER}mlp.up_proj.weight")
    unchecked = program.with_weights({down: program.weights[down] * 2})
    assert 0 < measure_drift(program, unchecked) < TOLERANCES[torch.bfloat16]
    step = FoldScales(scales={UP_DOWN: torch.full((112,), 2.0), VALUES: torch.full((48,), 2.0)})
    fact = fold(damaged, step).fact(FoldedScales)
    assert (list(fact.refused), list(fact.folds)) == ([UP_DOWN], [VALUES])


class Branches(nn.Module):
    """Tokens go one way, padding another."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.token = nn.Linear(24, 8)
        self.padding = nn.Linear(24, 8)

    def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.up(features)
        tokens = attention_mask.bool()[:, :, None]
        return torch.where(tokens, self.token(hidden), self.padding(hidden))


def branches(features: Tensor) -> Program:
    torch.manual_seed(0)
    mask = torch.ones(features.shape[:2], dtype=torch.long)
    program = capture(Branches().eval(), {"features": features, "attention_mask": mask})
    return FindScaleGroups()(program).program


@pytest.mark.parametrize("features", [torch.randn(2, 5, 16), torch.zeros(2, 3, 16)])
def test_what_the_example_inputs_do_not_reach_is_tried(features: Tensor) -> None:
    program = branches(features)
    (group,) = program.fact(ScaleGroups).groups
    assert fold(program, equalizing()).fact(FoldedScales).folds
    for member in ("padding.weight", "token.weight", "up.bias"):
        damaged = without(program, group, member)
        assert list(fold(damaged, equalizing()).fact(FoldedScales).refused) == [group]


def test_where_nothing_can_be_compared_nothing_is_folded() -> None:
    program = branches(torch.randn(2, 5, 16))
    zeros = {name: program.weights[name] * 0 for name in program.weights if "up" not in name}
    fact = fold(program.with_weights(zeros), FoldScales(scales=draw(program))).fact(FoldedScales)
    assert fact.folds == {}
    assert all("nothing can be proven" in why for why in fact.refused.values())
    assert fact.refused


def test_given_scales_are_folded_as_they_are() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    scales = torch.linspace(-3, 2.9, 112)
    folded = fold(program, FoldScales(scales={UP_DOWN: scales}))
    up, down = (f"{LAYER}mlp.{x}_proj.weight" for x in ("up", "down"))
    exact = scales.double()
    assert torch.equal(folded.weights[down], (program.weights[down].double() * exact).float())
    expected = (program.weights[up].double() / exact[:, None]).float()
    torch.testing.assert_close(folded.weights[up], expected, rtol=1e-7, atol=0)
    assert list(folded.fact(FoldedScales).folds) == [UP_DOWN]
    # They are the whole, not a part: once more changes nothing.
    assert not FoldScales(scales={UP_DOWN: scales})(folded).modified


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_refused(value: float) -> None:
    program = FindScaleGroups()(small_program("mlp")).program
    (group,) = program.fact(ScaleGroups).groups.values()
    assert group.positive
    scales = torch.ones(group.size)
    scales[7] = value
    with pytest.raises(CompileError, match="the scale of channel 7 is") as caught:
        FoldScales(scales={group.name: scales})(program)
    assert caught.value.where == group.name
    assert "ReLU" in str(caught.value.next_step)
    assert caught.value.pass_name == "fold-scales"


def test_scales_for_no_group_or_of_another_size_are_refused() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    with pytest.raises(CompileError, match="112 channels") as caught:
        FoldScales(scales={UP_DOWN: torch.ones(5)})(program)
    assert caught.value.where == UP_DOWN
    with pytest.raises(CompileError, match="there is no group of scales 'up -> down'") as caught:
        PassManager([FoldScales(scales={"up -> down": torch.ones(5)})])(program)
    assert "->" in str(caught.value.next_step)


def test_what_would_overflow_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 4)).eval().half()
    with torch.no_grad():
        model[1].weight *= 5e3
        model[0].weight /= 5e3
    program = capture(model, {"input": torch.randn(3, 8).half()})
    program = FindScaleGroups()(program).program
    first, second = program.fact(ScaleGroups).groups.values()
    step = FoldScales(scales={first.name: torch.full((16,), 32.0), second.name: torch.ones(24) / 4})
    folded = fold(program, step)
    fact = folded.fact(FoldedScales)
    assert "torch.float16 ends at 6.55e+04" in fact.refused[first.name]
    assert "1.weight" in fact.refused[first.name]
    assert list(fact.folds) == [second.name]
    assert torch.equal(folded.weights["2.weight"], program.weights["2.weight"] / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "guess"}, "no method"), ({"alpha": 1.5}, "alpha"), ({"limit": 0.5}, "limit")],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        FoldScales(**options)  # type: ignore[arg-type]
    assert caught.value.next_step


def test_methods_that_look_at_data_need_it() -> None:
    program = FindScaleGroups()(small_program("llama")).program
    for method in ("activation", "smoothquant"):
        with pytest.raises(RequirementError, match="needs Statistics"):
            FoldScales(method)(program)


def test_include_and_exclude_choose_groups_by_their_readers() -> None:
    program = FindScaleGroups()(small_program("llama")).program

    def folds(**options: tuple[str, ...]) -> set[str]:
        return set(fold(program, equalizing(**options)).fact(FoldedScales).folds)

    assert folds(include=("*down_proj",)) == {UP_DOWN}
    assert UP_DOWN not in folds(exclude=("*down_proj",))
    # One reader that is not to be scaled keeps the others from it.
    assert NORM not in folds(exclude=("*k_proj",))
    head = "model.norm.weight -> lm_head.weight"
    assert head not in folds()
    assert folds(include=("lm_head",)) == {head}


# Stage by stage, live models and checkpoints.


def post_norm_program() -> Program:
    """An OPT-350M: norms behind the residual, and projections in front of and behind the layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
        max_position_embeddings=64,
        **sizes,
    )
    torch.manual_seed(0)
    model = hf.OPTForCausalLM(config).eval()
    randomize(model)
    inputs = ZOO["opt"].inputs
    program = capture(model, inputs())
    return dataclasses.replace(program, calibration=(inputs(2, 9), inputs(3, 11, padded=True)))


def test_a_norm_that_ends_a_layer_and_an_embedding_that_is_a_head() -> None:
    program = FindScaleGroups()(post_norm_program()).program
    groups = program.fact(ScaleGroups).groups
    decoder = "model.decoder."
    norm = f"{decoder}layers.2.final_layer_norm.weight -> {decoder}project_out.weight"
    embedding = f"{decoder}embed_tokens.weight -> {decoder}project_in.weight"
    signs = [int(reader.exponents[0]) for reader in groups[embedding].consumers]
    assert signs == [1, -1]  # What shrinks for the projection grows for the head.
    everything = ("*",)
    passes = [Observe(include=everything), FoldScales(include=everything)]
    result = PassManager(passes)(program).program
    # Layer by layer, a norm and the linear behind its layer are in two parts.
    folded = result.fact(FoldedScales)
    assert folded.folds
    assert folded.folds.keys().isdisjoint({norm, embedding})
    # All at once they are folded, and statistics follow, padding left out.
    observed = Observe(include=everything)(program).program
    whole = fold(observed, FoldScales(include=everything))
    assert whole.fact(FoldedScales).folds.keys() >= {norm, embedding}
    for program in (result, whole):
        known = program.fact(Statistics).edges
        fresh = Observe(include=everything)(program).program.fact(Statistics).edges
        for name, edge in fresh.items():
            assert known[name].count == edge.count
            found, expected = known[name].total_of_squares, edge.total_of_squares
            noise = 1e-6 * float(expected.max())  # of a channel that is a small difference
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=noise)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_stage_by_stage_is_as_all_at_once(name: str, captured: Callable[[str], Program]) -> None:
    entry = ZOO[name]
    program = dataclasses.replace(captured(name), calibration=(entry.inputs(3, 11),))
    step = FoldScales(power_of_two=True)
    whole = fold(known(program), step)
    result = PassManager([FindScaleGroups(), Observe(), step])(program)
    assert len(result.stages) > 1
    assert result.program.fact(FoldedScales).folds.keys() == whole.fact(FoldedScales).folds.keys()
    for parameter in whole.weights:
        assert torch.equal(result.program.weights[parameter], whole.weights[parameter]), parameter
    assert outputs_are_equal(program, result.program)
    back = PassManager([FoldScales("unfold")])(result.program).program
    assert all(torch.equal(back.weights[n], program.weights[n]) for n in program.weights)


def test_a_live_model_gets_the_folded_weights(tmp_path: Path) -> None:
    for power_of_two in (True, False):
        model = small_model("llama")
        program = small_program("llama")
        dense = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            expected = model(**program.example_inputs).logits
        compiled = compile_sparse(
            model,
            [FindScaleGroups(), Observe(), FoldScales(power_of_two=power_of_two)],
            example_inputs=program.example_inputs,
            calibration=program.calibration,
        )
        with torch.no_grad():
            found = model(**program.example_inputs).logits
        assert torch.equal(found, expected) == power_of_two
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(model.state_dict()[f"{LAYER}mlp.up_proj.weight"],
                               dense[f"{LAYER}mlp.up_proj.weight"])  # fmt: skip
        for name, value in model.named_parameters():
            assert torch.equal(value, compiled.program.weights[name])
        assert torch.equal(compiled(**program.example_inputs)["logits"], found)
        folder = tmp_path / str(power_of_two)
        compiled.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(**program.example_inputs).logits, found)


def test_weights_on_disk_stay_there(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    batch = dict(small_program("llama").example_inputs)
    folding = [FindScaleGroups(), Observe(), FoldScales(power_of_two=True)]
    compiled = compile_sparse(tmp_path / "dense", folding, calibration=[batch])
    down = compiled.program.weights.source(f"{LAYER}mlp.down_proj.weight")
    assert isinstance(down, Scaled)
    assert isinstance(down.source, OnDisk)
    with torch.no_grad():
        expected = model(**batch).logits
    assert torch.equal(compiled(**batch)["logits"], expected)
    compiled.save_pretrained(tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    unfolded = FoldScales("unfold")(compiled.program).program
    for linear in find_linears(unfolded):
        assert isinstance(unfolded.weights.source(linear.parameter), OnDisk)
