"""refine-dsnot: the swaps of the public code, one row at a time, and errors that only fall."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.passes.references import keep as reference_keep
from tests.passes.references import keep_rows
from tests.small import small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import Mask, Masks
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.weight_swaps import Moments, best_counts, propose_swaps
from zeroskip.ir.weights import pack_bits
from zeroskip.passes import (
    ApplyMasks,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
    RefineDSnoT,
    ShiftToBias,
)

PATTERNS = ("0.5", "0.8", "2:4", "4:8", "1:4")


def reference_row(
    weight: list[float],
    keep: list[bool],
    x: Tensor,
    group: int | None,
    cycles: int = 50,
    tolerance: float = 0.0,
    power: float = 1.0,
) -> list[bool]:
    """The public loop for one row, on its calibration inputs, with lists that are walked through.

    Where it runs out of weights of the right sign, the public code goes on with weights that it
    must not touch; here the row ends.
    """
    x = x.double()
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    size = x.square().mean(0).sqrt()
    effect = [w * float(m) for w, m in zip(weight, mean, strict=True)]
    wanda = [abs(w) * float(s) for w, s in zip(weight, size, strict=True)]
    gain = [e / max(float(v), 1e-30) ** power for e, v in zip(effect, variance, strict=True)]
    width, result = len(weight), list(keep)
    pruned = [j for j in range(width) if not keep[j]]
    error = sum(effect[j] for j in pruned)
    limit = tolerance * math.sqrt(sum(wanda[j] ** 2 for j in pruned))
    sign = math.copysign(1, error)
    # Largest first where the error is positive, most negative first where it is not.
    growable = {
        True: sorted((j for j in pruned if effect[j] > 0), key=lambda j: -gain[j]),
        False: sorted((j for j in pruned if effect[j] < 0), key=lambda j: gain[j]),
    }
    prunable = {
        True: sorted((j for j in range(width) if keep[j] and effect[j] < 0), key=wanda.__getitem__),
        False: sorted(
            (j for j in range(width) if keep[j] and effect[j] > 0), key=wanda.__getitem__
        ),
    }
    touched: set[int] = set()
    for _ in range(cycles):
        if abs(error) <= limit:
            break
        side = error > 0
        if not growable[side]:
            break
        grown = growable[side].pop(0)
        if group is None:
            if not prunable[side]:
                break
            loser = prunable[side].pop(0)
        else:
            start = grown - grown % group
            rivals = [
                j for j in range(start, min(start + group, width)) if keep[j] and j not in touched
            ]
            if not rivals:
                continue
            loser = min(rivals, key=wanda.__getitem__)
            if math.copysign(1, error + effect[loser] - effect[grown]) != sign:
                break
        touched |= {grown, loser}
        result[grown], result[loser] = True, False
        error += effect[loser] - effect[grown]
    return result


class Single(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


@functools.cache
def captured_linear(rows: int, width: int, dtype: torch.dtype) -> Program:
    x = {"x": torch.zeros(2, width, dtype=dtype)}
    return capture(Single(rows, width).to(dtype).eval(), x)


def single_program(weight: Tensor, x: Tensor) -> Program:
    """One linear, calibrated on two batches of different size, and of different mean if x has it so."""
    rows, width = weight.shape
    program = captured_linear(rows, width, weight.dtype).with_weights({"fc.weight": weight})
    batches = ({"x": x[: len(x) // 3]}, {"x": x[len(x) // 3 :]})
    return dataclasses.replace(program, calibration=batches)


def problem(
    seed: int = 0, rows: int = 20, width: int = 32, tokens: int = 60
) -> tuple[Tensor, Tensor]:
    """A weight and inputs: correlated, of different sizes and means, the mean drifting with time."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.3 * torch.randn(width, width, generator=generator) + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x = x + torch.randn(width, generator=generator)
    x = x + torch.linspace(-1, 1, tokens).unsqueeze(1) * torch.randn(width, generator=generator)
    return torch.randn(rows, width, generator=generator), x


def masks_of(program: Program) -> dict[str, Tensor]:
    return {name: mask.keep() for name, mask in program.fact(Masks).masks.items()}


def refine(program: Program, *steps: Pass) -> Tensor:
    keep: Tensor = PassManager(steps)(program).program.fact(Masks).masks["fc.weight"].keep()
    return keep


def row_errors(weight: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    """Mean square of what each output loses, float64."""
    return (x.double() @ weight.masked_fill(keep, 0).double().T).square().mean(0)


def mean_errors(weight: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    return weight.masked_fill(keep, 0).double() @ x.double().mean(0)


def group_of(pattern: str) -> int | None:
    return int(pattern.split(":")[1]) if ":" in pattern else None


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", [PruneWanda, PruneMagnitude])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_masks_are_those_of_the_public_loop(
    pattern: str, pruner: type[PruneWanda], tolerance: float
) -> None:
    # The variance is that of all batches together: their means differ.
    weight, x = problem()
    program = single_program(weight, x)
    step = RefineDSnoT(tolerance=tolerance, guard=False)
    found = refine(program, Observe(), pruner(pattern), step)
    size = x.double().square().mean(0).sqrt().float() if pruner is PruneWanda else 1.0
    start = reference_keep(weight.abs() * size, pattern)
    expected = torch.tensor(
        [
            reference_row(w.tolist(), k.tolist(), x, group_of(pattern), tolerance=tolerance)
            for w, k in zip(weight, start, strict=True)
        ]
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, start)


@pytest.mark.parametrize(("cycles", "power"), [(1, 1.0), (3, 0.0), (7, 2.0)])
def test_cycles_and_power(cycles: int, power: float) -> None:
    weight, x = problem(1)
    step = RefineDSnoT(cycles=cycles, tolerance=0.0, power=power, guard=False)
    found = refine(single_program(weight, x), Observe(), PruneMagnitude("50%"), step)
    start = keep_rows(weight.abs(), 0.5)
    rows = zip(weight, start, strict=True)
    expected = [reference_row(w.tolist(), k.tolist(), x, None, cycles, 0.0, power) for w, k in rows]
    assert torch.equal(found, torch.tensor(expected))
    assert int((found != start).sum(1).max()) <= 2 * cycles


@pytest.mark.parametrize("pattern", ["50%", "50% matrix", "2:4", "3:7 pad", "1:4"])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("guard", [False, True])
def test_every_row_keeps_as_many_as_before(pattern: str, gram: bool, guard: bool) -> None:
    weight, x = problem(2)
    program = single_program(weight, x)
    steps = (Observe(gram=gram), PruneMagnitude(pattern))
    before, after = refine(program, *steps), refine(program, *steps, RefineDSnoT(guard=guard))
    assert torch.equal(before.sum(1), after.sum(1))
    assert parse_pattern(pattern).violation(after) is None
    assert not torch.equal(before, after)
    if (group := group_of(pattern.split()[0])) is not None:
        kept = [
            torch.nn.functional.pad(k, (0, -32 % group)).view(20, -1, group).sum(2)
            for k in (before, after)
        ]
        assert torch.equal(*kept)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("seed", range(4))
def test_with_a_gram_matrix_no_error_rises(pattern: str, seed: int) -> None:
    weight, x = problem(seed)
    program = single_program(weight, x)
    steps = (Observe(gram=True), PruneWanda(pattern))
    before = refine(program, *steps)
    guarded = refine(program, *steps, RefineDSnoT())
    published = refine(program, *steps, RefineDSnoT(guard=False))
    old, new, free = (row_errors(weight, k, x) for k in (before, guarded, published))
    assert bool((new <= old).all())
    assert new.sum() < 0.97 * old.sum()
    # What the guard is for.
    assert bool((free > old).any())
    same = (guarded == before).all(1)
    assert torch.equal(new[same], old[same])


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_without_one_no_estimate_rises(pattern: str) -> None:
    weight, x = problem(3)
    program = single_program(weight, x)
    steps = (Observe(), PruneMagnitude(pattern))
    before, after = refine(program, *steps), refine(program, *steps, RefineDSnoT())
    variance = x.double().var(0, unbiased=False)

    def estimate(keep: Tensor) -> Tensor:
        lost = weight.masked_fill(keep, 0).double()
        return mean_errors(weight, keep, x).square() + lost.square() @ variance

    assert bool((estimate(after) <= estimate(before)).all())
    assert estimate(after).sum() < 0.97 * estimate(before).sum()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_each_row_stops_where_its_error_is_least(known: bool, group: int | None) -> None:
    weight, x = problem(4, rows=300)  # More rows than are looked at together.
    exact = x.double()
    gram = (exact.T @ exact / len(x)).float()
    variance = exact.var(0, unbiased=False)
    moments = Moments(exact.mean(0), variance, gram if known else None)
    second = gram.double() if known else exact.mean(0).outer(exact.mean(0)) + variance.diag()
    keep = reference_keep(weight.abs(), "2:4")
    swaps = propose_swaps(weight, keep, moments, group, tolerance=0.0)
    counts = best_counts(swaps, weight, keep, moments)
    errors = []
    for count in range(swaps.made.shape[1] + 1):
        kept = swaps.apply(keep, torch.full((300,), count))
        lost = weight.masked_fill(kept, 0).double()
        errors.append((lost * (lost @ second)).sum(1))
    table = torch.stack(errors, 1)
    chosen = table.gather(1, counts.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, table.min(1).values, rtol=1e-5, atol=1e-9)
    assert 0 < int((counts > 0).sum()) < 300
    assert torch.equal(swaps.apply(keep), swaps.apply(keep, torch.full((300,), 99)))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_the_mean_error_falls_as_published(pattern: str) -> None:
    weight, x = problem(5)
    program = single_program(weight, x)
    steps = (Observe(), PruneWanda(pattern))
    before = refine(program, *steps)
    after = refine(program, *steps, RefineDSnoT(tolerance=0.1, guard=False))
    old, new = (mean_errors(weight, k, x).abs() for k in (before, after))
    assert new.sum() < 0.8 * old.sum()


def test_the_length_of_the_calibration_data_does_not_matter() -> None:
    # The public threshold is of a sum over tokens: with more of them, more rows go on for longer.
    weight, x = problem(6)
    found = [
        refine(
            single_program(weight, data),
            Observe(),
            PruneWanda("50%"),
            RefineDSnoT(tolerance=0.1, guard=False),
        )
        for data in (x, torch.cat([x[:20].repeat(16, 1), x[20:].repeat(16, 1)]))
    ]
    assert torch.equal(*found)
    start = refine(single_program(weight, x), Observe(), PruneWanda("50%"))
    assert 0 < int((found[0] == start).all(1).sum()) < 20


@pytest.mark.parametrize("name", ["gpt2", "moe", "convnet"])
def test_every_linear_is_refined(name: str) -> None:
    # The public default leaves out the feed-forward layers, and its OPT layers end in an error.
    program = PassManager([Observe(gram=True), PruneMagnitude("50%")])(small_program(name)).program
    result = RefineDSnoT()(program)
    assert result.drift is None  # Neither graph nor weights have changed.
    before, after = masks_of(program), masks_of(result.program)
    statistics = program.fact(Statistics)
    unseen = 0
    for linear in find_linears(program):
        if linear.name not in before:
            continue
        old, new = before[linear.name], after[linear.name]
        assert torch.equal(old.sum(1), new.sum(1))
        edge = statistics.of(linear.name)
        if linear.expert is not None and edge.count < 16:
            unseen += 1
            assert torch.equal(old, new)
            continue
        assert not torch.equal(old, new), linear.name
        second = statistics.gram_of(linear.name).double() / edge.count
        weight = linear.weight(program)
        errors = []
        for kept in (old, new):
            lost = weight.masked_fill(kept, 0).double()
            errors.append((lost * (lost @ second)).sum(1))
        assert bool((errors[1] <= errors[0]).all())
    assert (unseen > 0) == (name == "moe")


def test_a_second_run_leaves_its_own_masks() -> None:
    program = PassManager([Observe(), PruneWanda("2:4")])(small_program("mlp")).program
    once = RefineDSnoT(cycles=1)(program)
    assert once.modified
    scores = {mask.score for mask in once.program.fact(Masks).masks.values()}
    assert scores == {"prune-wanda+refine-dsnot"}
    assert not RefineDSnoT()(once.program).modified
    chosen_anew = PruneWanda("2:4")(once.program).program
    assert RefineDSnoT()(chosen_anew).modified


def test_include_and_exclude() -> None:
    program = PassManager([Observe(), PruneWanda("2:4")])(small_program("mlp")).program
    for step in (RefineDSnoT(include=("up",)), RefineDSnoT(exclude=("down",))):
        masks = step(program).program.fact(Masks).masks
        assert masks["up.weight"].score == "prune-wanda+refine-dsnot"
        assert masks["down.weight"] is program.fact(Masks).masks["down.weight"]
    with pytest.raises(CompileError, match="matches no linear"):
        PassManager([Observe(), PruneWanda("2:4"), RefineDSnoT(include=("nonsense",))])(
            small_program("mlp")
        )


def test_dead_channels_are_neither_grown_nor_counted() -> None:
    weight, x = problem(7)
    dead = [0, 5, 6, 31]
    x[:, dead] = 0
    for pattern in ("50%", "2:4"):
        steps = (Observe(gram=True), PruneWanda(pattern))
        before = refine(single_program(weight, x), *steps)
        after = refine(single_program(weight, x), *steps, RefineDSnoT(tolerance=0.0))
        assert not (after & ~before)[:, dead].any()
        assert torch.equal(before.sum(1), after.sum(1))
        assert not torch.equal(before, after)


def test_a_channel_that_never_varies_is_grown_first() -> None:
    # Division by a variance of zero: all that it does is to move the mean.
    weight, x = problem(8)
    x[:, 3] = 2.0
    weight[:, 3] = 0.01
    x[:, [i for i in range(32) if i != 3]] += 1.0
    step = RefineDSnoT(cycles=1, guard=False)
    before = refine(single_program(weight, x), Observe(), PruneMagnitude("50%"))
    after = refine(single_program(weight, x), Observe(), PruneMagnitude("50%"), step)
    helps = mean_errors(weight, before, x) > 0
    assert 0 < int(helps.sum()) < 20
    assert not before[:, 3].any()
    assert torch.equal(after[:, 3], helps)


def test_nothing_to_do() -> None:
    weight, x = problem(9)
    centred = torch.cat([x, -x])  # Every mean is zero.
    dead = torch.zeros_like(x)
    for data, some in ((centred, weight), (dead, weight), (x, torch.zeros_like(weight))):
        for step in (RefineDSnoT(), RefineDSnoT(guard=False)):
            steps = (Observe(), PruneMagnitude("2:4"))
            before = refine(single_program(some, data), *steps)
            assert torch.equal(before, refine(single_program(some, data), *steps, step))
    kept = refine(single_program(weight, x), Observe(), PruneWanda("0%"), RefineDSnoT())
    assert kept.all()


def test_equal_weights_go_by_position() -> None:
    weight, x = torch.ones(2, 8), torch.ones(6, 8)
    x[::2] = 2.0
    weight[:, 4:] = -1.0
    keep = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]).bool().expand(2, 8)
    moments = Moments(x.double().mean(0), x.double().var(0, unbiased=False))
    swaps = propose_swaps(weight, keep, moments, cycles=1)
    assert swaps.grown.tolist() == [[0], [0]]
    assert swaps.pruned.tolist() == [[4], [4]]


@pytest.mark.parametrize(("rows", "width"), [(1, 12), (12, 1), (1, 1), (3, 4)])
@pytest.mark.parametrize("pattern", ["50%", "2:4 pad"])
def test_one_row_or_one_column(rows: int, width: int, pattern: str) -> None:
    weight, x = problem(10, rows=rows, width=width)
    steps = (Observe(gram=True), PruneMagnitude(pattern))
    before = refine(single_program(weight, x), *steps)
    for step in (RefineDSnoT(), RefineDSnoT(guard=False)):
        after = refine(single_program(weight, x), *steps, step)
        assert torch.equal(before.sum(1), after.sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    weight, x = problem(11)
    weight, x = weight.to(dtype), x.to(dtype)
    steps = (Observe(gram=True), PruneWanda("2:4"), RefineDSnoT())
    found = refine(single_program(weight, x), *steps)
    assert torch.equal(found, refine(single_program(weight.float(), x.float()), *steps))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_the_same_bytes_twice_and_with_two_threads(pattern: str) -> None:
    weight, x = problem(12, rows=300)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            steps = (Observe(gram=True), PruneWanda(pattern), RefineDSnoT())
            found.append(refine(single_program(weight, x), *steps))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_shift_to_bias_comes_after_it() -> None:
    program = small_program("gpt2")
    first = PassManager([Observe(), PruneWanda("2:4"), RefineDSnoT(), ShiftToBias()])(program)
    assert first.program
    with pytest.raises(CompileError, match="its bias makes up for the mask") as caught:
        PassManager([Observe(), PruneWanda("2:4"), ShiftToBias(), RefineDSnoT()])(program)
    assert caught.value.pass_name == "refine-dsnot"
    assert "shift-to-bias after" in str(caught.value.next_step)


def test_masks_that_were_applied_are_refused() -> None:
    steps = [Observe(), PruneWanda("2:4"), ApplyMasks(), Observe(), RefineDSnoT()]
    with pytest.raises(CompileError, match="applied already") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.pass_name == "refine-dsnot"
    assert caught.value.where == "up.weight"
    assert "between the pruner and apply-masks" in str(caught.value.next_step)


def test_blocks_are_refused() -> None:
    steps = [Observe(), PruneMagnitude("block:4x8:0.5"), RefineDSnoT()]
    with pytest.raises(PatternError, match="keeps no weight on its own") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.pass_name == "refine-dsnot"
    assert caught.value.where == "up.weight"
    assert "exclude" in str(caught.value.next_step)


def test_masks_and_statistics_are_asked_for() -> None:
    with pytest.raises(RequirementError, match="Masks"):
        PassManager([Observe(), RefineDSnoT()])(small_program("mlp"))
    with pytest.raises(RequirementError, match="Statistics"):
        PassManager([PruneMagnitude(), RefineDSnoT()])(small_program("mlp"))
    steps = [Observe(exclude=("down",)), PruneMagnitude(), RefineDSnoT()]
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager(steps)(small_program("mlp"))
    assert caught.value.where == "down.weight"


@pytest.mark.parametrize(
    "options",
    [{"cycles": 0}, {"tolerance": -1.0}, {"tolerance": math.nan}, {"power": -0.5}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="out of range") as caught:
        RefineDSnoT(**options)  # type: ignore[arg-type]
    assert next(iter(options)) in str(caught.value)


def test_an_expert_with_few_tokens_keeps_its_mask_and_its_name() -> None:
    program = PassManager([Observe(), PruneMagnitude("2:4")])(small_program("moe")).program
    known = program.fact(Statistics)
    few = [name for name, edge in known.edges.items() if "[" in name and edge.count < 16]
    masks = RefineDSnoT()(program).program.fact(Masks).masks
    assert few
    for name, mask in masks.items():
        assert mask.score == "prune-magnitude" + ("" if name in few else "+refine-dsnot")


def test_masks_that_somebody_made_by_hand() -> None:
    weight, x = problem(13)
    program = Observe()(single_program(weight, x)).program
    keep = torch.rand(20, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = Mask(pack_bits(keep), (20, 32), parse_pattern("10% global"), "mine")
    refined = RefineDSnoT()(program.with_fact(Masks({"fc.weight": mask}))).program
    (found,) = refined.fact(Masks).masks.values()
    assert torch.equal(found.keep().sum(1), keep.sum(1))
    assert found.score == "mine+refine-dsnot"


def test_what_is_given_is_not_written_into() -> None:
    weight, x = problem(14)
    keep = keep_rows(weight.abs(), 0.5)
    exact = x.double()
    edge = EdgeStatistics(len(x), exact.sum(0), exact.square().sum(0), x.abs().amax(0))
    before = [t.clone() for t in (weight, keep, edge.total, edge.total_of_squares)]
    for group in (None, 4):
        moments = Moments(edge.mean(), edge.variance())
        swaps = propose_swaps(weight, keep, moments, group)
        swaps.apply(keep, best_counts(swaps, weight, keep, moments))
    for now, then in zip((weight, keep, edge.total, edge.total_of_squares), before, strict=True):
        assert torch.equal(now, then)
