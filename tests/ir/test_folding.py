"""Folding scales into weights: rounded once, undone by what was not folded, lazily where on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError
from zeroskip.ir.folding import (
    Fold,
    FoldedScales,
    Scaled,
    check_scales,
    divide_statistics,
    find_group,
    fold_groups,
    fold_scales,
    spread,
    unfolded,
)
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import Consumer, Member, ScaleGroup, ScaleGroups, find_scale_groups
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.weights import InMemory, Masked, OnDisk, pack_bits


@pytest.fixture
def chain() -> Program:
    """Three linears in a row: two groups that meet in the weight of the second."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)]
    model = torch.nn.Sequential(*layers).eval()
    program = capture(model, {"input": torch.randn(2, 6)})
    return program.with_fact(find_scale_groups(program))


@pytest.fixture
def groups(chain: Program) -> list[ScaleGroup]:
    return list(chain.fact(ScaleGroups).groups.values())


FIRST = torch.tensor([3.0, 0.7, 1.1, 5.0, 0.3]).double()
SECOND = torch.tensor([1.3, 2.1, 0.9, 7.0]).double()


def test_all_groups_of_a_weight_are_rounded_once(chain: Program, groups: list[ScaleGroup]) -> None:
    folded = fold_groups(chain, list(zip(groups, (FIRST, SECOND), strict=True)))
    weight = chain.weights["1.weight"].double()
    expected = (weight * FIRST / SECOND[:, None]).float()
    assert torch.equal(folded.weights["1.weight"], expected)
    assert torch.equal(folded.weights["0.bias"], (chain.weights["0.bias"].double() / FIRST).float())
    last = (chain.weights["2.weight"].double() * SECOND).float()
    assert torch.equal(folded.weights["2.weight"], last)
    assert folded.weights.source("2.bias") is chain.weights.source("2.bias")


def on_disk(program: Program, folder: Path) -> Program:
    save_file({n: program.weights[n].clone() for n in program.weights}, folder / "w.safetensors")
    sources = {
        name: OnDisk(folder / "w.safetensors", name, tensor.shape, tensor.dtype)
        for name, tensor in program.weights.items()
    }
    return program.with_weights(sources)


def test_weights_on_disk_are_scaled_when_loaded(
    chain: Program, groups: list[ScaleGroup], tmp_path: Path
) -> None:
    program = on_disk(chain, tmp_path)
    folded = fold_scales(program, groups[0], FIRST)
    again = fold_scales(folded, groups[1], SECOND)
    source = again.weights.source("1.weight")
    assert isinstance(source, Scaled)
    # However many folds: one source on disk, rounded once.
    assert source.source is program.weights.source("1.weight")
    both = fold_groups(chain, list(zip(groups, (FIRST, SECOND), strict=True)))
    for name in both.weights:
        assert torch.equal(again.weights[name], both.weights[name])
    back = fold_scales(fold_scales(again, groups[0], 1 / FIRST), groups[1], 1 / SECOND)
    for name in program.weights:
        assert back.weights.source(name) is program.weights.source(name)


def test_a_mask_stays_outermost(chain: Program, groups: list[ScaleGroup], tmp_path: Path) -> None:
    for program in (chain, on_disk(chain, tmp_path)):
        keep = torch.rand(4, 5) > 0.5
        masked = Masked(program.weights.source("1.weight"), pack_bits(keep))
        folded = fold_scales(program.with_weights({"1.weight": masked}), groups[0], FIRST)
        source = folded.weights.source("1.weight")
        assert isinstance(source, Masked)
        assert source.bits is masked.bits
        assert isinstance(source.source, InMemory if program is chain else Scaled)
        assert torch.equal(folded.weights["1.weight"] != 0, keep)


def test_one_plus_w_is_what_is_scaled() -> None:
    channels, exponents = torch.arange(3), -torch.ones(3, dtype=torch.int8)
    member = Member("gain", None, False, 1.0, 1.0, channels, exponents)
    gain = torch.tensor([0.5, -0.25, 1.0])
    found = member.scaled(gain, torch.tensor([2.0, 4.0, 0.5]))
    torch.testing.assert_close(1 + found, (1 + gain) / torch.tensor([2.0, 4.0, 0.5]))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(4), "5 channels"),
        (torch.ones(5, 1), "5 channels"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), "channel 1 is 0"),
        (torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0]), "channel 2 is nan"),
        (torch.tensor([1.0, 1.0, 1.0, 1.0, float("inf")]), "channel 4 is inf"),
    ],
)
def test_scales_are_checked(groups: list[ScaleGroup], scales: torch.Tensor, message: str) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        check_scales(groups[0], scales)
    assert caught.value.where == groups[0].name
    check_scales(groups[0], -torch.ones(5))
    positive = dataclasses.replace(groups[0], positive=True)
    with pytest.raises(CompileError, match="channel 0 is -1"):
        check_scales(positive, -torch.ones(5))


def test_an_overflow_names_the_weight_and_the_group(chain: Program) -> None:
    half = {name: tensor.half() for name, tensor in chain.weights.items()}
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).half().eval()
    model.load_state_dict({name: half[name] for name in model.state_dict()})
    program = capture(model, {"input": torch.randn(2, 6).half()})
    (group,) = find_scale_groups(program).groups.values()
    fold_scales(program, group, torch.full((5,), 1e4))
    with pytest.raises(CompileError, match=r"float16 ends at 6\.55e") as caught:
        fold_scales(program, group, torch.full((5,), 1e6))
    assert caught.value.where == f"1.weight of {group.name}"


def test_a_group_is_found_by_name(chain: Program, groups: list[ScaleGroup]) -> None:
    known = chain.fact(ScaleGroups).groups
    assert find_group(known, groups[1].name) is groups[1]
    with pytest.raises(CompileError, match="no group of scales") as caught:
        find_group(known, "1.weight -> 3.weight")
    assert "'1.weight -> 2.weight'" in str(caught.value.next_step)
    with pytest.raises(CompileError) as caught:
        find_group({}, "x")
    assert caught.value.next_step == "this program has none"


def edge(width: int, seed: int) -> EdgeStatistics:
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(seed)).double()
    gram = (rows.T @ rows).float()
    return EdgeStatistics(20, rows.sum(0), (rows**2).sum(0), rows.abs().amax(0).float(), gram)


def test_statistics_are_divided(chain: Program, groups: list[ScaleGroup]) -> None:
    scales = torch.tensor([2.0, -4.0, 0.5, 1.0, 8.0]).double()
    known = Statistics({"1.weight": edge(5, 0), "2.weight": edge(4, 1)})
    folded = fold_scales(chain.with_fact(known), groups[0], scales).fact(Statistics)
    before, after = known.edges["1.weight"], folded.edges["1.weight"]
    assert after.count == before.count
    assert torch.equal(after.total, before.total / scales)
    assert torch.equal(after.total_of_squares, before.total_of_squares / scales**2)
    assert torch.equal(after.abs_max, before.abs_max / scales.abs().float())
    assert before.gram is not None
    assert after.gram is not None
    assert torch.equal(after.gram, before.gram / torch.outer(scales, scales).float())
    assert folded.edges["2.weight"] is known.edges["2.weight"]


def test_inputs_outside_a_group_keep_their_statistics() -> None:
    channels = torch.tensor([1, -1, 0])
    scales = torch.tensor([2.0, 4.0]).double()

    def reader(name: str, channels: torch.Tensor, sign: int = 1) -> Consumer:
        return Consumer(name, channels, torch.where(channels >= 0, sign, 0).to(torch.int8))

    assert spread(scales, reader("a", channels)).tolist() == [4, 1, 2]
    # Where a weight shrinks, its input grows.
    assert spread(scales, reader("a", channels, -1)).tolist() == [0.25, 1, 0.5]
    shared = edge(3, 0)
    known = Statistics(dict.fromkeys("abcde", shared))
    consumers = [reader("a", channels), reader("b", channels), reader("c", channels.flip(0))]
    consumers += [reader("e", channels, -1), reader("unknown", channels)]
    found = divide_statistics(known, consumers, scales).edges
    assert torch.equal(found["a"].total, shared.total / torch.tensor([4, 1, 2]))
    assert torch.equal(found["c"].total, shared.total / torch.tensor([2, 1, 4]))
    assert torch.equal(found["e"].total, shared.total * torch.tensor([4, 1, 2]))
    assert found["a"] is found["b"]
    assert found["d"] is shared
    assert found.keys() == known.edges.keys()


def test_what_was_folded_adds_up_and_is_forgotten_when_undone(groups: list[ScaleGroup]) -> None:
    first, second = groups
    fact = FoldedScales(refused={first.name: "why", "other": "that"})
    fact = fact.after(first, FIRST)
    assert fact.refused == {"other": "that"}
    fact = fact.after(first, FIRST).after(second, SECOND)
    assert torch.equal(fact.total(first), FIRST * FIRST)
    fact = fact.after(first, 1 / (FIRST * FIRST))
    assert list(fact.folds) == [second.name]
    assert torch.equal(fact.total(first), torch.ones(5).double())


def test_parts_of_the_fact_belong_to_linears(chain: Program, groups: list[ScaleGroup]) -> None:
    first, second = groups
    fact = FoldedScales().after(first, FIRST).after(second, SECOND)
    assert list(fact.restrict(["0.weight", "1.weight"]).folds) == [first.name]
    assert fact.restrict(["1.weight"]).folds == {}
    refused = FoldedScales(refused={first.name: "why"})
    assert refused.merge(fact).refused == {}
    assert fact.merge(refused).refused == {first.name: "why"}
    program = chain.with_fact(fact)
    assert fact.check(program) is None
    for scales, reason in (
        (torch.zeros(5), "zero or not finite"),
        (torch.full((5,), torch.nan), "zero or not finite"),
        (torch.ones(6), "6 scales were folded"),
    ):
        wrong = FoldedScales({first.name: Fold(scales, first.linears)})
        assert reason in str(wrong.check(program))


def test_unfolded_is_what_was_there_before(chain: Program, groups: list[ScaleGroup]) -> None:
    known = chain.with_fact(Statistics({"1.weight": edge(5, 0)}))
    assert unfolded(known) is known
    folded = fold_groups(known, list(zip(groups, (FIRST, SECOND), strict=True)))
    fact = FoldedScales().after(groups[0], FIRST).after(groups[1], SECOND)
    back = unfolded(folded.with_fact(fact))
    for name in known.weights:
        torch.testing.assert_close(back.weights[name], known.weights[name], rtol=2e-7, atol=0)
    found, expected = (p.fact(Statistics).edges["1.weight"].total for p in (back, known))
    torch.testing.assert_close(found, expected)
