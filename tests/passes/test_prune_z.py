"""prune-z: the masks of the public code's score, and none of its traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes import references
from tests.small import small_model, small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError, PatternError, RecipeError, RequirementError
from zeroskip.ir.facts import Masks
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.passes import Observe, PassManager, PruneZ

TOKENS = 64


def official(weight: Tensor, squares: Tensor) -> Tensor:
    """The score of the public code: squares are sums over the tokens of a sequence."""
    by_row = weight / weight.norm(p=2, dim=1, keepdim=True)
    by_column = weight / weight.norm(p=2, dim=0, keepdim=True)
    z_row = (by_row - by_row.mean()) / by_row.std()
    z_column = (by_column - by_column.mean()) / by_column.std()
    sparsity = (weight.abs() < weight.abs().mean() * 0.1).to(weight.dtype).mean()
    alpha = 0.7 * (1 - 0.3 * sparsity)
    importance = alpha * z_row.abs() ** 3 + (1 - alpha) * z_column.abs() ** 3
    return importance * torch.sqrt(squares.reshape(1, -1)) ** 1.5


def program_of(weight: Tensor, mean_square: Tensor | None = None) -> Program:
    """A program of one linear that knows the mean square of each of its inputs."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    program = capture(nn.Sequential(layer).eval(), {"input": torch.ones(2, columns).to(weight)})
    squares = torch.ones(columns) if mean_square is None else mean_square
    zeros = torch.zeros(columns)
    edge = EdgeStatistics(TOKENS, zeros.double(), squares.double() * TOKENS, zeros)
    return program.with_fact(Statistics({"0.weight": edge}))


def kept(program: Program, pattern: str, **options: Any) -> Tensor:
    return PruneZ(pattern, **options)(program).program.fact(Masks).masks["0.weight"].keep()


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Heavy tails, and rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    sizes = torch.rand(rows, 1, generator=generator) + torch.rand(1, columns, generator=generator)
    return normal * normal.abs() * sizes + 0.01


@pytest.mark.parametrize("shape", [(24, 32), (48, 16), (7, 20)])
def test_masks_are_those_of_the_public_code(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    squares = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) * 5
    program = program_of(weight, squares)
    scores = official(weight.double(), squares.double() * TOKENS)
    # As published, `<= threshold` prunes one weight too many: the threshold itself.
    count = int(weight.numel() * 0.5)
    threshold = scores.flatten().sort().values[count]
    mask = kept(program, "50% matrix")
    assert torch.equal(mask, scores >= threshold)
    assert int((scores <= threshold).sum()) == count + 1
    assert int((~mask).sum()) == count
    assert torch.equal(kept(program, "50%"), references.keep_rows(scores, 0.5))
    assert torch.equal(kept(program, "30%"), references.keep_rows(scores, 0.3))


def test_n_m_is_n_m() -> None:
    # The public code takes the option, and prunes each matrix by a threshold all the same.
    weight = drawn(24, 32)
    scores = official(weight.double(), torch.full((32,), 64.0).double())
    mask = kept(program_of(weight), "2:4")
    assert torch.equal(mask, references.keep_n_of_m(scores, 2, 4))
    assert torch.equal(mask.view(-1, 4).sum(1), torch.full((24 * 8,), 2))


def test_blocks_add_up_scores_that_grow_like_weights() -> None:
    weight, squares = drawn(16, 32), torch.rand(32) + 0.5
    scores = official(weight.double(), squares.double()) ** (1 / 3)
    sums = scores.view(4, 4, 4, 8).sum((1, 3)).flatten()
    expected = torch.zeros(16, dtype=torch.bool)
    expected[sums.argsort()[8:]] = True
    mask = kept(program_of(weight, squares), "block:4x8:0.5")
    blocks = mask.view(4, 4, 4, 8).permute(0, 2, 1, 3).reshape(16, -1)
    assert torch.equal(blocks.all(1), expected)
    assert torch.equal(blocks.any(1), expected)


def test_every_option_counts() -> None:
    weight, squares = drawn(24, 32), torch.rand(32) * 5 + 0.1
    program = program_of(weight, squares)
    plain = kept(program, "50%")
    changes: list[dict[str, float]] = [
        {"base": 0.0},
        {"adaptation": 1.0, "small": 3.0},
        {"exponent": 0.0},
    ]
    for options in changes:
        assert not torch.equal(kept(program, "50%", **options), plain), options
    # All of the columns and none of the activations.
    columns = weight / weight.norm(dim=0)
    z = (columns - columns.mean()).abs().double()
    mask = kept(program, "50%", base=0.0, exponent=0.0)
    assert torch.equal(mask, references.keep_rows(z, 0.5))


def test_zero_rows_and_columns_do_not_spoil_the_rest() -> None:
    weight = drawn(24, 32)
    weight[[3, 20]] = 0
    weight[:, [0, 5, 31]] = 0
    assert official(weight, torch.ones(32)).isnan().all()  # The public code's.
    program = program_of(weight)
    assert int(kept(program, "50% matrix").sum()) == 24 * 16
    rows = kept(program, "50%")
    assert bool((rows.sum(1) == 16).all())
    # Zeros are close to the mean: what is left alive of a row outlives most of them.
    assert float(rows[:, [0, 5, 31]].float().mean()) < 0.1


def test_dead_inputs_are_pruned_first() -> None:
    squares = torch.ones(32)
    squares[::4] = 0
    mask = kept(program_of(drawn(24, 32), squares), "25%")
    assert not mask[:, ::4].any()
    assert int(mask.sum()) == 24 * 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype: torch.dtype) -> None:
    # z is 60 here: its cube is beyond float16, and times a dead channel that would be NaN.
    weight = drawn(96, 64).clamp(-0.02, 0.02)
    weight[5, 7] = weight[6, 8] = 3.0
    weight = weight.to(dtype)
    squares = torch.ones(64)
    squares[8] = 0
    mask = kept(program_of(weight, squares), "50% matrix")
    assert torch.equal(mask, kept(program_of(weight.float(), squares), "50% matrix"))
    assert int(mask.sum()) == 96 * 32
    assert mask[5, 7]
    assert not mask[:, 8].any()


def test_awkward_shapes() -> None:
    for shape in ((1, 16), (16, 1), (1, 1)):
        mask = kept(program_of(drawn(*shape)), "50% matrix")
        count = shape[0] * shape[1]
        assert int((~mask).sum()) == count // 2
    row = drawn(1, 16)
    # One row: columns of length 1 are signs; the row alone is left to tell weights apart.
    z = (row / row.norm() - (row / row.norm()).mean()).abs()
    assert torch.equal(kept(program_of(row), "50%", base=1.0), references.keep_rows(z, 0.5))


def test_ties_go_by_position() -> None:
    # All weights are the same: no spread, no scores but zeros.
    expected = (torch.arange(16) >= 8).expand(4, 16)
    assert torch.equal(kept(program_of(torch.full((4, 16), 0.3)), "50%"), expected)
    assert torch.equal(kept(program_of(drawn(4, 16), torch.zeros(16)), "50%"), expected)
    assert torch.equal(kept(program_of(torch.zeros(4, 16)), "50%"), expected)


def test_tiny_and_huge_weights_are_scored_like_others() -> None:
    weight = drawn(24, 32)
    plain = kept(program_of(weight), "50%")
    for power in (-100, 80):  # Squares are beyond float32, on either side.
        assert torch.equal(kept(program_of(weight * 2.0**power), "50%"), plain)


def test_the_same_with_one_thread_and_with_two() -> None:
    program = program_of(drawn(512, 384))
    before = torch.get_num_threads()
    masks = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        try:
            masks.append(kept(program, "50% matrix"))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.filterwarnings("ignore:prune-z prunes")
@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_transposed_weights_and_experts(name: str) -> None:
    observed = Observe()(small_program(name)).program
    masks = PruneZ("50%")(observed).program.fact(Masks).masks
    parameters = dict(small_model(name).named_parameters())
    seen = 0
    for linear, mask in masks.items():
        edge = observed.fact(Statistics).of(linear)
        parameter, _, expert = linear.removesuffix("]").partition("[")
        weight = parameters[parameter].detach()
        weight = weight[int(expert)] if expert else weight
        weight = weight.T if name == "gpt2" else weight
        if expert and edge.count < 16:
            scores = weight.abs()
        else:
            scores = official(weight.double(), edge.total_of_squares)
            seen += 1
        assert torch.equal(mask.keep(), references.keep_rows(scores, 0.5)), linear
    assert seen >= 4


@pytest.mark.parametrize(
    ("option", "value"),
    [("base", 1.5), ("base", float("nan")), ("adaptation", -0.1), ("exponent", -1), ("small", -1)],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{option}=.* out of range") as caught:
        PruneZ(**{option: value})  # type: ignore[arg-type]
    assert caught.value.pass_name == "prune-z"
    assert caught.value.next_step


def test_refusals() -> None:
    with pytest.raises(PatternError, match="on a scale of its own"):
        PassManager([Observe(), PruneZ("50% global")])(small_program("mlp"))
    with pytest.raises(RequirementError, match="no calibration statistics") as caught:
        PassManager([Observe(exclude=("down",)), PruneZ("2:4")])(small_program("mlp"))
    assert caught.value.where == "down.weight"
    weight = drawn(8, 8)
    weight[2, 3] = float("nan")
    with pytest.raises(CompileError, match=r"holds nan at \[2, 3\]"):
        kept(program_of(weight), "50%")
    assert str(parse_pattern(PruneZ().pattern)) == "0.5"
