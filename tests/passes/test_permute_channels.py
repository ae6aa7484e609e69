"""permute-channels: the same function over the zoo, more of the scores kept, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.kept_traces import capture_once as capture
from tests.small import small_program
from tests.zoo import ZOO
from zeroskip.ir.channel_groups import ChannelGroups, find_channel_groups
from zeroskip.ir.channel_permutation import PermutedChannels, Reordered, permute_channels
from zeroskip.ir.errors import CompileError, PatternError, RecipeError
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.folding import FoldedScales
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import NM
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.ir.statistics import ScoreMultipliers, Statistics, Steering
from zeroskip.ir.weights import OnDisk
from zeroskip.passes import (
    ApplyMasks,
    FindScaleGroups,
    FoldScales,
    Observe,
    PassManager,
    PermuteChannels,
    PruneMagnitude,
    PruneRIA,
    PruneWanda,
)
from zeroskip.passes import permute_channels as module
from zeroskip.passes.base import TOLERANCES, measure_drift

LAYER = "model.layers.0."
DOWN = f"{LAYER}mlp.down_proj.weight"
OUT = f"{LAYER}self_attn.o_proj.weight"

# The linears whose inputs can be permuted, in every layer, by the ends of their names.
PERMUTED = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "opt": {"self_attn.out_proj.weight", "fc2.weight"},
    "gpt2": {"attn.c_proj.weight", "mlp.c_proj.weight"},
    "phi3": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "mixtral": {"self_attn.o_proj.weight"} | {f"mlp.experts.down_proj[{e}]" for e in range(4)},
    "qwen3_moe": {"self_attn.o_proj.weight"} | {f"mlp.experts.down_proj[{e}]" for e in range(4)},
    "falcon": {"self_attention.dense.weight", "mlp.dense_4h_to_h.weight"},
    "t5": {
        "layer.0.SelfAttention.o.weight",
        "layer.1.EncDecAttention.o.weight",
        "layer.1.DenseReluDense.wo.weight",
        "layer.2.DenseReluDense.wo.weight",
    },
    "bert": {"attention.output.dense.weight", "output.dense.weight"},
}


def kept(scores: Tensor) -> float:
    return float(scores.masked_fill(~NM(2, 4).project(scores), 0).sum())


def scores_of(program: Program, name: str) -> Tensor:
    (linear,) = [n for n in find_linears(program) if n.name == name]
    return PruneRIA("2:4").finite_scores(program, linear)


@pytest.mark.parametrize("name", PERMUTED)
@pytest.mark.filterwarnings("ignore:.*by magnitude")
def test_the_same_function_that_keeps_more(name: str, captured: Callable[[str], Program]) -> None:
    entry = ZOO[name]
    program = dataclasses.replace(captured(name), calibration=(entry.inputs(3, 16, padded=True),))
    program = Observe()(program).program
    result = PermuteChannels("2:4")(program)
    permuted, fact = result.program, result.program.fact(PermutedChannels)
    assert result.modified
    assert 0 < measure_drift(program, permuted, entry.inputs(*entry.sizes[1], padded=True)) < 1e-5

    for end in PERMUTED[name]:
        assert any(linear.endswith(f".{end}") for linear in fact.linears), end
    for linear in fact.linears:
        assert any(linear.endswith(f".{end}") for end in PERMUTED[name]), linear
    for linear, each in fact.linears.items():
        before, after = scores_of(program, linear), scores_of(permuted, linear)
        torch.testing.assert_close(after, before[:, each.order], rtol=1e-4, atol=0)
        assert kept(after) > kept(before), linear
        assert each.before == pytest.approx(kept(before) / float(before.sum()), rel=1e-5)
        assert each.after == pytest.approx(kept(after) / float(after.sum()), rel=1e-5)

    others = {n.name for n in find_linears(program)} - set(fact.linears)
    reasons = {n: why for n, why in fact.refused.items() if n in others}
    assert reasons
    assert all("residual stream" in why for why in reasons.values())

    if name in ("opt", "phi3"):  # Others are run twice by the contract.
        assert not PermuteChannels("2:4")(permuted).modified


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_all_members_are_needed(name: str) -> None:
    program = small_program(name)
    limit = TOLERANCES[torch.float32]
    groups = find_channel_groups(program).groups
    for group in (groups[0], groups[-1]):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(1))
        assert measure_drift(program, permute_channels(program, [(group, order)])) < limit
        for missing in group.members:
            rest = tuple(member for member in group.members if member is not missing)
            broken = dataclasses.replace(group, members=rest)
            moved = measure_drift(program, permute_channels(program, [(broken, order)]))
            assert moved > 100 * limit, (group.name, missing.parameter)


def test_queries_keys_and_norms_stay() -> None:
    program = Observe()(small_program("llama")).program
    permuted = PermuteChannels("2:4")(program).program
    changed = {
        name
        for name in program.weights
        if not torch.equal(program.weights[name], permuted.weights[name])
    }
    assert changed == {
        f"{LAYER}{end}.weight"
        for end in (
            *("self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }


def test_a_permutation_that_moves_the_outputs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Observe()(small_program("llama")).program
    found = find_channel_groups(program)

    def wrong(_: Program) -> ChannelGroups:
        broken = [
            dataclasses.replace(g, members=g.members[1:]) if "down_proj" in g.name else g
            for g in found.groups
        ]
        return dataclasses.replace(found, groups=tuple(broken))

    monkeypatch.setattr(module, "find_channel_groups", wrong)
    permuted = PermuteChannels("2:4")(program).program
    fact = permuted.fact(PermutedChannels)
    assert "the outputs moved by" in fact.refused[DOWN]
    assert torch.equal(permuted.weights[DOWN], program.weights[DOWN])
    assert torch.equal(fact.linears[DOWN].order, torch.arange(112))
    assert fact.linears[DOWN].before == fact.linears[DOWN].after
    assert OUT not in fact.refused
    assert not torch.equal(permuted.weights[OUT], program.weights[OUT])


def test_outputs_that_prove_nothing_permute_nothing() -> None:
    program = Observe()(small_program("mlp")).program
    dead = program.with_weights({"down.weight": torch.full((16, 24), float("nan"))})
    with pytest.raises(CompileError, match="the weight holds nan"):
        PermuteChannels("2:4")(dead)


# What is known of a program moves along.


def test_statistics_are_those_of_the_permuted_program() -> None:
    program = Observe(gram=True)(small_program("moe")).program
    permuted = PermuteChannels("2:4")(program).program
    fresh = Observe(gram=True)(permuted).program.fact(Statistics).edges
    for name, edge in permuted.fact(Statistics).edges.items():
        assert edge.count == fresh[name].count
        for part in ("total", "total_of_squares", "abs_max", "gram"):
            found, expected = getattr(edge, part), getattr(fresh[name], part)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_multipliers_of_scores_move_along() -> None:
    program = Observe()(small_program("llama")).program
    multipliers = torch.linspace(0.5, 2, 112)
    steering = ScoreMultipliers({DOWN: Steering(multipliers, 1.0, 1.0, 0)})
    permuted = PermuteChannels("2:4")(program.with_fact(steering)).program
    order = permuted.fact(PermutedChannels).linears[DOWN].order
    found = permuted.fact(ScoreMultipliers).linears[DOWN].multipliers
    assert torch.equal(found, multipliers[order])


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_folded_scales_move_along(name: str) -> None:
    program = small_program(name)
    for step in (FindScaleGroups(), Observe(), FoldScales(power_of_two=True)):
        program = step(program).program
    groups = find_channel_groups(program).groups
    generator = torch.Generator().manual_seed(0)
    moves = [(g, torch.randperm(g.size, generator=generator)) for g in groups]
    permuted = permute_channels(program, moves)
    assert permuted.fact(ScaleGroups).check(permuted) is None
    # Folded, permuted and unfolded is what permuting alone gives, to the bit.
    plain = permute_channels(small_program(name), moves)
    unfolded = FoldScales("unfold")(permuted).program
    assert unfolded.fact(FoldedScales).folds == {}
    for parameter in plain.weights:
        assert torch.equal(unfolded.weights[parameter], plain.weights[parameter]), parameter


def test_weights_on_disk_stay_there(tmp_path: Path) -> None:
    program = Observe()(small_program("llama")).program
    expected = PermuteChannels("2:4")(program).program
    save_file({n: program.weights[n].contiguous() for n in program.weights}, tmp_path / "w")
    sources = {n: program.weights.source(n) for n in program.weights}
    on_disk = program.with_weights(
        {n: OnDisk(tmp_path / "w", n, s.shape, s.dtype) for n, s in sources.items()}
    )
    permuted = PermuteChannels("2:4")(on_disk).program
    found = permuted.weights.source(DOWN)
    assert isinstance(found, Reordered)
    assert isinstance(found.source, OnDisk)
    for name in expected.weights:
        assert torch.equal(permuted.weights[name], expected.weights[name])
    # A second permutation adds to the first.
    twice = PermuteChannels("1:4")(permuted).program
    source = twice.weights.source(DOWN)
    assert isinstance(source, Reordered)
    assert isinstance(source.source, OnDisk)
    assert len(source.parts) == 2
    order = twice.fact(PermutedChannels).linears[DOWN].order
    assert torch.equal(twice.weights[DOWN], program.weights[DOWN][:, order])


# With a pruner, stage by stage.


@pytest.mark.parametrize("pruner", [PruneRIA("2:4"), PruneWanda("2:4"), PruneMagnitude("2:4")])
def test_a_pruner_keeps_more_behind_it(pruner: PruneRIA) -> None:
    program = small_program("llama")
    first = [Observe(), PermuteChannels("2:4", pruner=pruner.name)]
    result = PassManager([*first, pruner, ApplyMasks()])(program).program
    fact = result.fact(PermutedChannels)
    assert set(fact.linears) == {DOWN, OUT}
    assert all(each.after > each.before for each in fact.linears.values())
    assert {each.score for each in fact.linears.values()} == {pruner.name}
    assert len(result.fact(SparseWeights).masks) == 7
    assert all("residual stream" in why for why in fact.refused.values())
    if pruner.name == "prune-magnitude":
        plain = PassManager([pruner, ApplyMasks()])(program).program
        assert result.weights[DOWN].abs().sum() > plain.weights[DOWN].abs().sum()


def test_stages_are_permuted_like_the_whole(captured: Callable[[str], Program]) -> None:
    program = dataclasses.replace(captured("bert"), calibration=(ZOO["bert"].inputs(3, 16),))
    with pytest.warns(UserWarning, match="nothing is pruned after it"):
        staged = PassManager([Observe(), PermuteChannels("2:4")])(program).program
    whole = PermuteChannels("2:4")(Observe()(program).program).program
    found, expected = (p.fact(PermutedChannels).linears for p in (staged, whole))
    assert set(found) == set(expected)
    assert measure_drift(program, staged) < 1e-5
    assert all(each.after > each.before for each in found.values())


def test_the_same_order_with_any_number_of_threads() -> None:
    program = Observe()(small_program("llama")).program
    threads = torch.get_num_threads()
    orders = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            fact = PermuteChannels("2:4")(program).program.fact(PermutedChannels)
            orders.append({name: each.order for name, each in fact.linears.items()})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(orders[0][n], other[n]) for other in orders[1:] for n in orders[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    program = capture(ZOO["llama"].model(dtype=dtype), ZOO["llama"].inputs())
    program = Observe()(dataclasses.replace(program, calibration=(ZOO["llama"].inputs(3),))).program
    permuted = PermuteChannels("2:4")(program).program
    fact = permuted.fact(PermutedChannels)
    assert set(fact.linears) >= {DOWN, OUT}
    assert all(each.after > each.before for each in fact.linears.values())
    order = fact.linears[DOWN].order
    assert torch.equal(permuted.weights[DOWN], program.weights[DOWN][:, order])


def test_dead_weights_and_channels_are_no_obstacle() -> None:
    program = Observe()(small_program("llama")).program
    weight = program.weights[DOWN].clone()
    weight[:, ::3], weight[5] = 0, 0
    program = program.with_weights({DOWN: weight})
    fact = PermuteChannels("2:4")(program).program.fact(PermutedChannels)
    assert 0 < fact.linears[DOWN].before < fact.linears[DOWN].after <= 1


# Choice and refusals.


def test_include_and_exclude() -> None:
    program = Observe()(small_program("llama")).program
    only = PermuteChannels("2:4", include=("*down_proj",))(program).program
    assert set(only.fact(PermutedChannels).linears) == {DOWN}
    assert only.fact(PermutedChannels).refused == {}
    without = PermuteChannels("2:4", exclude=("*down_proj",))(program).program
    assert set(without.fact(PermutedChannels).linears) == {OUT}
    assert torch.equal(without.weights[DOWN], program.weights[DOWN])


class Two(nn.Module):
    """Two readers of one hidden value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.a, self.b = nn.Linear(width, 4), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.up(x))
        return self.a(hidden), self.b(hidden)


def observed(model: nn.Module) -> Program:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    program = dataclasses.replace(capture(model.eval(), {"x": x[:4]}), calibration=({"x": x},))
    return Observe()(program).program


def test_readers_of_one_value_get_one_order() -> None:
    torch.manual_seed(0)
    program = observed(Two())
    fact = PermuteChannels("2:4")(program).program.fact(PermutedChannels)
    assert torch.equal(fact.linears["a.weight"].order, fact.linears["b.weight"].order)
    gained = sum(each.after - each.before for each in fact.linears.values())
    assert gained > 0
    excluded = PermuteChannels("2:4", exclude=("b",))(program).program.fact(PermutedChannels)
    assert "a.weight" not in excluded.linears
    assert "b.weight too, which is excluded" in excluded.refused["a.weight"]


def test_groups_that_hold_channels_of_two_blocks_are_left_alone() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.up(x).chunk(2, -1)
            out: Tensor = self.down(torch.cat([torch.relu(first), torch.tanh(second)], -1))
            return out

    program = observed(Halves())  # Blocks of 6: the second group of 4 holds channels of both.
    result = PermuteChannels("2:4")(program)
    fact = result.program.fact(PermutedChannels)
    assert fact.linears == {}
    assert "hold channels of other blocks" in fact.refused["down.weight"]
    assert torch.equal(result.program.weights["down.weight"], program.weights["down.weight"])
    halves = PermuteChannels("1:2")(program).program.fact(PermutedChannels)
    assert set(halves.linears) == {"down.weight"}


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)
            self.up, self.down, self.out = nn.Linear(8, 16), nn.Linear(16, 20), nn.Linear(16, 4)
            self.down.weight = self.table.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.down(torch.relu(self.up(x)))
            return logits, self.out(torch.tanh(self.table(logits.argmax(-1))))

    program = observed(Tied())
    result = PermuteChannels("2:4", include=("*",))(program)
    fact = result.program.fact(PermutedChannels)
    assert fact.linears == {}
    assert "read by something else too" in fact.refused["out.weight"]


def test_a_short_last_group() -> None:
    torch.manual_seed(1)
    program = observed(Two(18))
    fact = PermuteChannels("2:4 pad")(program).program.fact(PermutedChannels)
    assert sorted(fact.linears["a.weight"].order.tolist()) == list(range(18))
    with pytest.raises(PatternError, match="18 is not a multiple of 4"):
        PassManager([Observe(), PermuteChannels("2:4")])(program)


def test_pruned_weights_are_left_alone() -> None:
    program = Observe()(small_program("llama")).program
    decided = PruneMagnitude("2:4")(program).program
    assert (
        "already pruned"
        in PermuteChannels("2:4")(decided).program.fact(PermutedChannels).refused[DOWN]
    )
    applied = Observe()(ApplyMasks()(decided).program).program
    result = PermuteChannels("2:4")(applied)
    assert result.program.fact(PermutedChannels).linears == {}
    assert result.drift is None
    bare = applied.without_facts([Masks, SparseWeights])
    fact = PermuteChannels("2:4")(bare).program.fact(PermutedChannels)
    assert "already pruned or rounded" in fact.refused[DOWN]


@pytest.mark.parametrize("pattern", ["50%", "50% matrix", "block:4x4:0.5"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="which channels are neighbours") as caught:
        PermuteChannels(pattern)
    assert caught.value.pass_name == "permute-channels"
    assert "2:4" in str(caught.value.next_step)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match="sweeps=-1"):
        PermuteChannels(sweeps=-1)
    with pytest.raises(RecipeError, match="'observe' is not a pruner") as caught:
        PassManager([Observe(), PermuteChannels(pruner="observe")])(small_program("mlp"))
    assert "prune-ria" in str(caught.value.next_step)


def test_a_list_in_which_it_is_of_no_use_is_warned_of() -> None:
    step = PermuteChannels("2:4")
    assert step.warning([PruneRIA("2:4"), ApplyMasks()]) is None
    assert "nothing is pruned" in str(step.warning([ApplyMasks()]))
    assert "prune-ria prunes 4:8" in str(step.warning([PruneRIA("4:8")]))


def test_the_fact_is_checked() -> None:
    program = Observe()(small_program("llama")).program
    fact = PermuteChannels("2:4")(program).program.fact(PermutedChannels)
    assert fact.check(program) is None
    part = fact.restrict([DOWN])
    assert set(part.linears) == {DOWN}
    assert part.refused == {}
    assert set(fact.restrict([]).merge(fact).linears) == set(fact.linears)
    twice = dataclasses.replace(fact.linears[DOWN], order=torch.zeros(112, dtype=torch.long))
    assert "is no permutation" in str(PermutedChannels({DOWN: twice}).check(program))
    assert "is not a linear" in str(PermutedChannels({"none": twice}).check(program))
