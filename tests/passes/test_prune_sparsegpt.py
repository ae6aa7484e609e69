"""prune-sparsegpt: the published result on one linear, exact counts, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes import references
from tests.small import small_program
from zeroskip.ir import optimal_surgery
from zeroskip.ir.budgets import Budgets
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.optimal_surgery import hessian_root, prune_columns
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.weights import pack_bits
from zeroskip.passes import (
    ApplyMasks,
    Observe,
    PassManager,
    PruneMagnitude,
    PruneSparseGPT,
    PruneWanda,
)

PATTERNS = ("50%", "37% matrix", "2:4", "4:8", "3:7 pad", "block:4x8:0.5", "block:1x16:0.3")


def correlated(
    rows: int, columns: int, tokens: int = 600, seed: int = 0, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * columns**-0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns))
    x = x * (0.5 + torch.rand(columns, generator=generator)) + 0.2
    x[:, list(dead)] = 0
    return torch.randn(rows, columns, generator=generator), x.T @ x


def surgery(weight: Tensor, gram: Tensor, pattern: str, **options: Any) -> tuple[Tensor, Tensor]:
    return prune_columns(weight, hessian_root(gram, 0.01), parse_pattern(pattern), **options)


def error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    change = (weight - pruned).double()
    return float((change @ gram.double() * change).sum())


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found == 0, expected == 0)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def never(start: int, weight: Tensor, inverse: Tensor) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize("dead", [(), (0, 5, 130)])
def test_half_of_the_matrix_is_as_published(dead: tuple[int, ...]) -> None:
    weight, gram = correlated(64, 256, dead=dead)
    # The published code prunes one more than its share of a block, so it is asked for one less.
    share = 0.5 - 1 / (64 * 128)

    def choose(start: int, block: Tensor, inverse: Tensor) -> Tensor:
        return references.published_share(block, inverse, share)

    updated, keep = surgery(weight, gram, "0.5 matrix")
    assert_close(updated, references.sparsegpt(weight, gram, choose))
    assert int(keep.sum()) == 64 * 128


@pytest.mark.parametrize("groups", [(2, 4), (4, 8)])
@pytest.mark.parametrize("dead", [(), (0, 5, 130)])
def test_groups_are_as_published(groups: tuple[int, int], dead: tuple[int, ...]) -> None:
    weight, gram = correlated(48, 200, dead=dead)
    updated, keep = surgery(weight, gram, f"{groups[0]}:{groups[1]}")
    expected = references.sparsegpt(weight, gram, never, groups)
    kept = expected != 0
    # Of a group with more dead inputs than are pruned, some that are kept are zero.
    alive = torch.ones(200, dtype=torch.bool)
    alive[list(dead)] = False
    assert torch.equal(keep[:, alive], kept[:, alive])
    assert float((updated - expected).norm() / expected.norm()) < 1e-4
    assert bool((keep.view(48, -1, groups[1]).sum(2) == groups[0]).all())


def test_each_row_is_as_in_the_published_loop_with_counts_by_row() -> None:
    weight, gram = correlated(24, 200)
    plain = weight.abs() * (gram.diagonal() + 0.01 * gram.diagonal().mean()).sqrt()
    wanted = ~references.keep_rows(plain, 0.5)

    def choose(start: int, block: Tensor, inverse: Tensor) -> Tensor:
        losses = block**2 / inverse.diagonal() ** 2
        pruned = torch.zeros_like(block, dtype=torch.bool)
        for row, order in enumerate(losses.argsort(dim=1, stable=True)):
            count = int(wanted[row, start : start + block.shape[1]].sum())
            pruned[row, order[:count]] = True
        return pruned

    for size in (128, 50):
        updated, keep = surgery(weight, gram, "50%", block_size=size)
        expected = references.sparsegpt(weight, gram, choose, block_size=size)
        assert_close(updated, expected)
        assert bool((keep.sum(1) == 100).all())


def test_blocks_are_as_in_the_published_loop_with_joint_costs() -> None:
    weight, gram = correlated(16, 96)
    diagonal = gram.diagonal() + 0.01 * gram.diagonal().mean()

    def by_block(losses: Tensor) -> Tensor:
        return losses.double().view(4, 4, -1, 8).sum((1, 3))

    def least(totals: Tensor, count: int) -> Tensor:
        order = totals.flatten().argsort(dim=0, stable=True)
        return torch.zeros(totals.numel(), dtype=torch.bool).scatter(0, order[:count], True)

    totals = by_block(weight**2 * diagonal)
    wanted = least(totals, totals.numel() // 2).view(totals.shape)

    def choose(start: int, block: Tensor, inverse: Tensor) -> Tensor:
        costs = torch.cat(
            [
                block[:, j : j + 8] @ torch.linalg.inv(inverse[j : j + 8, j : j + 8])
                for j in range(0, block.shape[1], 8)
            ],
            1,
        ).square()
        found = by_block(costs)
        strip = slice(start // 8, start // 8 + found.shape[1])
        pruned = least(found, int(wanted[:, strip].sum())).view(found.shape)
        return pruned.repeat_interleave(4, 0).repeat_interleave(8, 1)

    updated, keep = surgery(weight, gram, "block:4x8:0.5", block_size=37)
    assert_close(updated, references.sparsegpt(weight, gram, choose, block_size=32))
    assert int(keep.sum()) == 16 * 96 // 2


def test_a_given_mask_is_kept_and_the_update_is_the_published_one() -> None:
    weight, gram = correlated(24, 150)
    keep = references.keep_rows(weight.abs(), 0.4)

    def choose(start: int, block: Tensor, inverse: Tensor) -> Tensor:
        return ~keep[:, start : start + block.shape[1]]

    updated, kept = prune_columns(weight, hessian_root(gram, 0.01), keep)
    assert torch.equal(kept, keep)
    assert_close(updated, references.sparsegpt(weight, gram, choose))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_exact_and_the_error_falls(pattern: str) -> None:
    chosen = parse_pattern(pattern)
    width = 150 if "pad" in pattern or "%" in pattern else 160
    weight, gram = correlated(16, width)
    before = weight.clone()
    plain = chosen.project(weight.abs() * gram.diagonal().sqrt())
    for size in (1, 5, 20, 128, 1000):
        updated, keep = surgery(weight, gram, pattern, block_size=size)
        assert chosen.violation(keep) is None
        assert int(keep.sum()) == int(plain.sum())
        assert not updated[~keep].any()
        assert updated.is_contiguous()
        if size == 128:
            assert error(weight, updated, gram) < error(weight, weight * plain, gram)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:7 pad", "9:20"])
def test_groups_do_not_depend_on_blocks(pattern: str) -> None:
    weight, gram = correlated(16, 160)
    expected, keep = surgery(weight, gram, pattern)
    for size in (1, 6, 10, 36, 500):
        updated, kept = surgery(weight, gram, pattern, block_size=size)
        assert torch.equal(kept, keep)
        assert float((updated - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("pattern", ["50%", "2:4", "5:8", "3:7 pad", "block:2x4:0.5"])
def test_inputs_that_know_nothing_of_one_another_leave_the_rest_as_it_is(pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, gram = parse_pattern(pattern), torch.eye(24) * 7
    ties = torch.randint(1, 3, (8, 24), generator=generator).float()
    for weight in (torch.randn(8, 24, generator=generator), ties, torch.ones(8, 24)):
        updated, keep = surgery(weight, gram, pattern, block_size=8)
        assert chosen.violation(keep) is None
        assert torch.equal(updated, weight * keep)
        if not pattern.startswith("b"):
            # Ties go by position within what competes.
            assert torch.equal(keep, chosen.project(weight.square()))


def test_odd_shapes() -> None:
    for rows, columns in ((1, 40), (24, 1), (1, 1), (3, 2)):
        weight, gram = correlated(rows, columns)
        for pattern in ("50%", "50% matrix", "1:2 pad", "block:1x1:0.5"):
            chosen = parse_pattern(pattern)
            updated, keep = surgery(weight, gram, pattern)
            assert int(keep.sum()) == int(chosen.project(weight.abs()).sum())
            assert updated.shape == (rows, columns)


def test_dead_rows_dead_inputs_and_few_tokens() -> None:
    weight, gram = correlated(16, 96, tokens=20, dead=(3, 50))
    weight[5] = 0
    for pattern in ("50%", "50% matrix", "2:4", "block:4x4:0.5"):
        updated, keep = surgery(weight, gram, pattern)
        assert torch.isfinite(updated).all()
        assert not updated[5].any()
        assert not updated[:, [3, 50]].any()
        assert parse_pattern(pattern).violation(keep) is None
    updated, _ = surgery(weight, torch.zeros(96, 96), "50%")
    assert not updated.any()  # Nothing ever came in.


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    weight, gram = correlated(16, 96, dead=(3,))
    expected, _ = surgery(weight, gram, "2:4")
    for scale in (2.0**-40, 2.0**30):
        assert_close(surgery(weight, gram * scale, "2:4")[0], expected)


def test_ill_conditioned_inputs_are_nearer_to_float64_than_the_published_loop() -> None:
    weight, gram = correlated(32, 192, tokens=60)
    keep = references.keep_rows(weight.abs(), 0.5)

    def choose(start: int, block: Tensor, inverse: Tensor) -> Tensor:
        return ~keep[:, start : start + block.shape[1]]

    exact = references.sparsegpt(weight.double(), gram.double(), choose, damping=1e-4)
    published = references.sparsegpt(weight, gram, choose, damping=1e-4)
    updated, _ = prune_columns(weight, hessian_root(gram, 1e-4), keep)
    distance = float((updated - exact).norm() / exact.norm())
    assert distance < 1e-3
    assert distance < float((published - exact).norm() / exact.norm())


def test_the_root_is_the_inverse_of_the_published_factor() -> None:
    _, gram = correlated(1, 40)
    found = hessian_root(gram, 0.01)
    damped = gram + torch.eye(40) * 0.01 * gram.diagonal().mean()
    assert torch.allclose(found.root @ found.root.T, damped, rtol=1e-4, atol=1e-2)
    published = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    assert torch.allclose(found.root.double() @ published, torch.eye(40).double(), atol=1e-4)
    assert torch.equal(found.root, found.root.triu())


def test_damping_is_that_of_inputs_before_they_were_divided() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 12, generator=generator)
    rows[:, 5] = 0
    divisors = torch.rand(12, generator=generator).double() * 9 + 0.1
    gram, weight = rows.T @ rows, torch.randn(6, 12, generator=generator)
    divided = (rows.double() / divisors).float()
    small = divided.T @ divided
    pattern = parse_pattern("2:4")
    expected, kept = prune_columns(weight, hessian_root(gram, 0.1), pattern)
    scaled = (weight * divisors).float()
    found, keep = prune_columns(scaled, hessian_root(small, 0.1, divisors), pattern)
    assert torch.equal(keep, kept)
    torch.testing.assert_close((found / divisors).float(), expected, rtol=1e-3, atol=1e-4)
    # Damping alike for all channels is another thing.
    other = prune_columns(scaled, hessian_root(small, 0.1), pattern)[0]
    assert not torch.allclose((other / divisors).float(), expected, rtol=1e-2, atol=1e-3)


def test_damping_rises_until_the_hessian_has_a_root() -> None:
    _, gram = correlated(1, 40)
    mean = gram.diagonal().mean()
    lowest = torch.linalg.eigvalsh(gram.double())[0]
    for shift, damping in ((0.05, 0.1), (0.4, 1.0)):
        sunk = gram - torch.eye(40) * (float(lowest) + shift * mean)
        assert hessian_root(sunk, 0.01).damping == pytest.approx(damping)
    assert hessian_root(gram, 0.0).damping == 0
    _, singular = correlated(1, 40, tokens=3)
    singular[0, 0] -= 1e-3 * singular[0, 0]
    assert 0 < hessian_root(singular, 0.0).damping <= 0.1


def test_float64_is_tried_before_more_damping() -> None:
    # Whole numbers below 2^24: determinants are exact in float64, pivots lost in float32.
    p, q = 700_001, 1_000_003
    grams = [
        torch.tensor([[-(-(q * q) // n), q], [q, n]], dtype=torch.float32)
        for n in range(p, p + 200)
    ]
    failing = [g for g in grams if int(torch.linalg.cholesky_ex(g.flip(0, 1))[1])]
    assert failing, "float32 factorises all of them"
    for gram in failing:
        assert float(gram.double()[0, 0] * gram[1, 1] - gram[0, 1].double() ** 2) > 0
        assert hessian_root(gram, 0.0).damping == 0


def test_what_is_no_gram_matrix_is_refused() -> None:
    gram = torch.full((40, 40), 3.0).fill_diagonal_(1)
    with pytest.raises(CompileError, match="no Cholesky factor") as caught:
        hessian_root(gram, 0.01)
    assert "exclude" in str(caught.value.next_step)
    gram[3, 3] = float("inf")
    with pytest.raises(CompileError, match="not finite"):
        hessian_root(gram, 0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_deterministic(threads: int) -> None:
    before = torch.get_num_threads()
    weight, gram = correlated(32, 160)
    expected = {p: surgery(weight, gram, p) for p in ("50%", "2:4", "50% matrix")}
    torch.set_num_threads(threads)
    try:
        for pattern, (updated, keep) in expected.items():
            first, second = (surgery(weight, gram, pattern) for _ in range(2))
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
            assert torch.equal(first[1], keep)
            assert torch.allclose(first[0], updated, atol=1e-4)
    finally:
        torch.set_num_threads(before)


# The pass, and with it what `UpdatingPruner` does.


@functools.cache
def observed(name: str) -> Program:
    return Observe(gram=True)(small_program(name)).program


def pruned(program: Program, step: PruneSparseGPT) -> Program:
    return step(program).program


def linear_of(program: Program, name: str) -> Tensor:
    return next(n for n in find_linears(program) if n.name == name).weight(program)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
@pytest.mark.filterwarnings("ignore:.*by magnitude")
def test_every_linear_of_a_model_is_as_published(name: str) -> None:
    program = observed(name)
    result = pruned(program, PruneSparseGPT("2:4", block_size=16))
    masks = result.fact(SparseWeights).masks
    assert masks.keys() == result.fact(Masks).masks.keys()
    checked = 0
    for linear in find_linears(program):
        weight = linear.weight(program)
        if linear.name not in masks:
            assert torch.equal(linear.weight(result), weight)
            continue
        keep, found = masks[linear.name].keep(), linear.weight(result)
        assert not found[~keep].any()
        edge = program.fact(Statistics).of(linear.name)
        if linear.expert is not None and edge.count < 16:
            assert torch.equal(keep, references.keep_n_of_m(weight.abs(), 2, 4))
            assert torch.equal(found, weight * keep)
            continue
        assert edge.gram is not None
        assert_close(found, references.sparsegpt(weight, edge.gram, never, (2, 4)))
        checked += 1
    assert checked >= 4


def test_experts_with_few_tokens_are_pruned_by_magnitude_with_a_warning() -> None:
    program = observed("moe")
    statistics = program.fact(Statistics)
    name = next(n.name for n in find_linears(program) if n.expert is not None)
    starved = dataclasses.replace(statistics.of(name), count=3)
    program = program.with_fact(Statistics({**statistics.edges, name: starved}))
    with pytest.warns(UserWarning, match="by magnitude"):
        result = pruned(program, PruneSparseGPT("2:4"))
    weight = linear_of(program, name)
    keep = references.keep_n_of_m(weight.abs(), 2, 4)
    assert torch.equal(linear_of(result, name), weight * keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_so(dtype: torch.dtype) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 24, dtype=dtype)

        def forward(self, features: Tensor) -> Tensor:
            return torch.relu(self.fc(features))

    torch.manual_seed(0)
    inputs = {"features": torch.randn(64, 32).to(dtype)}
    program = dataclasses.replace(capture(One().eval(), inputs), calibration=[inputs])
    program = Observe(gram=True)(program).program
    result = pruned(program, PruneSparseGPT("2:4"))
    weight, gram = program.weights["fc.weight"], program.fact(Statistics).gram_of("fc.weight")
    expected = references.sparsegpt(weight.float(), gram, never, (2, 4)).to(dtype)
    found = result.weights["fc.weight"]
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=2 * torch.finfo(dtype).eps)
    assert torch.equal(found == 0, expected == 0)


def test_statistics_go_and_apply_masks_has_nothing_left_to_do() -> None:
    result = pruned(observed("llama"), PruneSparseGPT("50%"))
    assert Statistics not in result.facts
    applied = ApplyMasks()(result)
    assert applied.drift in (None, 0.0)
    for name in result.weights:
        assert torch.equal(applied.program.weights[name], result.weights[name])


def test_a_second_run_leaves_it_and_another_pattern_does_not() -> None:
    program = small_program("mlp")
    once = pruned(Observe(gram=True)(program).program, PruneSparseGPT("50%"))
    ready = Observe(gram=True)(once).program
    again = pruned(ready, PruneSparseGPT("50%"))
    other = pruned(ready, PruneSparseGPT("2:4"))
    assert torch.equal(again.weights["up.weight"], once.weights["up.weight"])
    assert not torch.equal(other.weights["up.weight"], once.weights["up.weight"])


def test_linears_that_share_an_input_share_a_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    work: Callable[..., Any] = optimal_surgery.hessian_root

    def counted(gram: Tensor, damping: float) -> Any:
        calls.append(id(gram))
        return work(gram, damping)

    monkeypatch.setattr("zeroskip.passes.prune_sparsegpt.hessian_root", counted)
    program = observed("llama")
    masks = pruned(program, PruneSparseGPT("50%")).fact(Masks).masks
    layers = len({name.split(".")[2] for name in masks})
    assert len(masks) == 7 * layers
    assert len(calls) == len(set(calls)) == 4 * layers


def test_budgets_are_obeyed() -> None:
    program = Observe(gram=True)(small_program("mlp")).program
    program = program.with_fact(Budgets({"up.weight": 0.25}))
    masks = pruned(program, PruneSparseGPT("50%")).fact(Masks).masks
    assert bool((masks["up.weight"].keep().sum(1) == 12).all())
    assert bool((masks["down.weight"].keep().sum(1) == 12).all())


def test_known_masks_are_preserved() -> None:
    program = observed("llama")
    chosen = PruneWanda("50%")(program).program
    result = pruned(chosen, PruneSparseGPT("2:4", preserve_mask=True))
    before, after = chosen.fact(Masks).masks, result.fact(Masks).masks
    improved = 0
    for linear in find_linears(program):
        if linear.name not in before:
            continue
        assert after[linear.name].same_as(before[linear.name])
        assert str(after[linear.name].pattern) == "0.5"
        weight, gram = linear.weight(program), program.fact(Statistics).gram_of(linear.name)
        plain = error(weight, weight * before[linear.name].keep(), gram)
        improved += error(weight, linear.weight(result), gram) < plain
    assert improved == len(before)


def test_masks_that_compare_linears_can_be_preserved_and_new_ones_are_obeyed() -> None:
    program = Observe(gram=True)(small_program("mlp")).program
    chosen = PruneMagnitude("50% global")(program).program
    result = pruned(chosen, PruneSparseGPT(preserve_mask=True))
    for name, mask in result.fact(Masks).masks.items():
        assert mask.same_as(chosen.fact(Masks).masks[name])
    ready = Observe(gram=True)(result).program
    assert torch.equal(
        pruned(ready, PruneSparseGPT(preserve_mask=True)).weights["up.weight"],
        result.weights["up.weight"],
    )
    keep = torch.zeros(24, 16, dtype=torch.bool)
    keep[:, :8] = True
    old = result.fact(Masks)
    new = Mask(pack_bits(keep), (24, 16), old.masks["up.weight"].pattern, "by hand")
    moved = pruned(
        ready.with_fact(old.merge(Masks({"up.weight": new}))), PruneSparseGPT(preserve_mask=True)
    )
    assert not moved.weights["up.weight"][:, 8:].any()


def test_masks_to_preserve_are_asked_for() -> None:
    program = Observe(gram=True)(small_program("mlp")).program
    with pytest.raises(RequirementError, match="needs Masks") as caught:
        PruneSparseGPT(preserve_mask=True)(program)
    assert "prune-wanda" in str(caught.value.next_step)
    partly = PruneWanda("50%", include=("up",))(program).program
    with pytest.raises(RequirementError, match="no mask of this linear") as caught:
        PruneSparseGPT(preserve_mask=True)(partly)
    assert caught.value.where == "down.weight"


def test_gram_matrices_are_asked_for() -> None:
    with pytest.raises(RequirementError, match="no Gram matrix") as caught:
        PassManager([Observe(), PruneSparseGPT()])(small_program("mlp"))
    assert "Observe(gram=True)" in str(caught.value.next_step)
    with pytest.raises(RequirementError, match="needs Statistics"):
        PassManager([PruneSparseGPT()])(small_program("mlp"))
    steps = [Observe(gram=True, exclude=("down",)), PruneSparseGPT()]
    with pytest.raises(RequirementError, match="no calibration statistics"):
        PassManager(steps)(small_program("mlp"))


def with_gram(program: Program, gram: Tensor) -> Program:
    squares = gram.diagonal().double()
    edge = EdgeStatistics(100, squares * 0, squares, squares.float(), gram)
    return program.with_fact(Statistics({"up.weight": edge}))


def test_what_cannot_be_factorised_is_named() -> None:
    program = with_gram(small_program("mlp"), torch.full((16, 16), 3.0).fill_diagonal_(1.0))
    with pytest.raises(CompileError, match="no Cholesky factor") as caught:
        PruneSparseGPT(include=("up",))(program)
    assert caught.value.where == "up.weight"
    assert caught.value.pass_name == "prune-sparsegpt"
    assert caught.value.next_step


def test_weights_that_are_not_finite_are_refused() -> None:
    program = with_gram(small_program("mlp"), torch.eye(16))
    weight = torch.ones(24, 16)
    weight[2, 3] = float("nan")
    with pytest.raises(CompileError, match=r"nan at \[2, 3\]"):
        PruneSparseGPT(include=("up",))(program.with_weights({"up.weight": weight}))
    # Two inputs that are the same: what one loses the other takes over, and overflows.
    gram = torch.ones(16, 16) + torch.eye(16) * 1e-4
    big = torch.full((24, 16), 3e38)
    with pytest.raises(CompileError, match="not finite") as caught:
        PruneSparseGPT(include=("up",))(with_gram(program, gram).with_weights({"up.weight": big}))
    assert caught.value.where == "up.weight"


def test_options_out_of_range_are_refused() -> None:
    for options in ({"block_size": 0}, {"damping": -0.1}, {"damping": 2.0}):
        with pytest.raises(RecipeError, match="out of range"):
            PruneSparseGPT(**options)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="on a scale of its own"):
        PassManager([Observe(gram=True), PruneSparseGPT("50% global")])(small_program("mlp"))
    with pytest.raises(PatternError, match="does not fit"):
        PassManager([Observe(gram=True), PruneSparseGPT("1:5")])(small_program("mlp"))
    with pytest.raises(PatternError, match="cannot be decided"):
        surgery(*correlated(2, 4), "50% global")
