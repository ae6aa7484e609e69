"""lower-masked: every spelling of a linear, why some stay as they are, and masks that are swapped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.small import small_model, small_program
from zeroskip import compile_sparse
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import RequirementError
from zeroskip.ir.facts import Lowered, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program, attribute
from zeroskip.ir.weights import pack_bits, unpack_bits
from zeroskip.passes import (
    ApplyMasks,
    LowerMasked,
    Observe,
    PassManager,
    PruneMagnitude,
    PruneWanda,
)

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
# Each as (shape of the weight, rank of x, operator in the graph, the product).
SPELLINGS: dict[str, tuple[tuple[int, int], int, str, Spelling]] = {
    "linear": ((8, 16), 3, "linear(", lambda x, w, b: nn.functional.linear(x, w)),
    "linear with bias": ((8, 16), 3, "linear(", lambda x, w, b: nn.functional.linear(x, w, b)),
    "addmm": ((16, 8), 2, "addmm(", lambda x, w, b: torch.addmm(b, x, w)),
    "addmm transposed": ((8, 16), 2, "addmm(", lambda x, w, b: torch.addmm(b, x, w.T)),
    "matmul": ((16, 8), 3, "matmul(", lambda x, w, b: torch.matmul(x, w)),
    "matmul transposed": ((8, 16), 3, "matmul(", lambda x, w, b: torch.matmul(x, w.mT)),
    "mm": ((16, 8), 2, "mm(", lambda x, w, b: torch.mm(x, w)),
    "mm transposed": ((8, 16), 2, "mm(", lambda x, w, b: torch.mm(x, w.t())),
}


class Spelled(nn.Module):
    def __init__(self, shape: tuple[int, int], product: Spelling) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(8, generator=generator))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def prune(program: Program, pattern: str = "2:4") -> Program:
    return PassManager([PruneMagnitude(pattern), ApplyMasks()])(program).program


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_lowered(name: str) -> None:
    shape, rank, operator, product = SPELLINGS[name]
    x = torch.randn(*(3, 5)[: rank - 1], 16, generator=torch.Generator().manual_seed(1))
    pruned = prune(capture(Spelled(shape, product).eval(), {"x": x}))
    assert operator in print_program(pruned)
    result = LowerMasked()(pruned)
    lowered = result.program
    assert lowered.level == "lowered"
    text = print_program(lowered)
    assert text.count("zeroskip.masked_linear(x, ") == 1
    assert "@weight_mask" in text
    assert operator not in text.replace("masked_linear(", "")
    assert lowered.fact(Lowered) == Lowered({"weight": "zeroskip::masked_linear"}, {})
    (linear,) = find_linears(lowered)
    assert linear.shape == (8, 16)
    keep = pruned.fact(SparseWeights).masks["weight"].keep()
    bits = attribute(lowered.graph_module, "weight_mask")
    assert torch.equal(unpack_bits(bits, (8, 16)), keep)
    torch.testing.assert_close(lowered.run({"x": x}), pruned.run({"x": x}))


def test_a_swapped_mask_takes_effect() -> None:
    dense = small_program("mlp")
    lowered = LowerMasked()(prune(dense)).program
    module = lowered.module()
    module.get_parameter("up.weight").data.copy_(dense.weights["up.weight"])
    other = torch.rand(24, 16, generator=torch.Generator().manual_seed(3)) < 0.3
    for keep in (other, torch.ones(24, 16, dtype=torch.bool), torch.zeros(24, 16).bool()):
        module.get_buffer("up.weight_mask").copy_(pack_bits(keep))
        expected = small_model("mlp")
        with torch.no_grad():
            expected.up.weight.mul_(keep)
            expected.down.weight.copy_(lowered.weights["down.weight"])
            features = dense.example_inputs["features"]
            torch.testing.assert_close(module(features)[0], expected(features))


def test_a_shared_weight_shares_its_mask() -> None:
    text = print_program(LowerMasked()(prune(small_program("mlp"))).program)
    assert text.count("@up.weight, @up.weight_mask, @up.bias") == 1
    assert text.count("@up.weight, @up.weight_mask, @again.bias") == 1


def test_refusals_say_why() -> None:
    program = small_program("moe")
    lowered = LowerMasked()(prune(program)).program.fact(Lowered)
    prefix = "model.layers.0"
    assert lowered.operators == {
        f"{prefix}.self_attn.{n}_proj.weight": "zeroskip::masked_linear" for n in "qkvo"
    }
    assert lowered.refusals["lm_head.weight"] == "it is not pruned"
    assert lowered.refusals[f"{prefix}.mlp.gate.weight"] == "it is not pruned"
    experts = [n for n in lowered.refusals if "experts" in n]
    assert len(experts) == 8
    assert {lowered.refusals[n] for n in experts} == {
        "its weight is 3-D, one matrix for each expert"
    }
    assert set(lowered.operators) | set(lowered.refusals) == {
        linear.name for linear in find_linears(program)
    }


def test_nothing_to_lower_leaves_the_level() -> None:
    steps = [PruneMagnitude("2:4", include=("*.experts.*",)), ApplyMasks()]
    result = LowerMasked()(PassManager(steps)(small_program("moe")).program)
    assert result.program.level == "captured"
    assert result.program.fact(Lowered).operators == {}
    assert result.drift is None


def test_a_part_of_the_linears_is_lowered() -> None:
    steps = [PruneMagnitude("2:4", include=("down",)), ApplyMasks(), LowerMasked()]
    program = PassManager(steps)(small_program("mlp")).program
    assert program.fact(Lowered).refusals == {"up.weight": "it is not pruned"}
    text = print_program(program)
    assert text.count(" linear(") == 2
    assert text.count("masked_linear(") == 2


def test_sparse_weights_are_asked_for() -> None:
    with pytest.raises(RequirementError, match="lower-masked needs SparseWeights"):
        PassManager([PruneMagnitude(), LowerMasked()])(small_program("mlp"))


class Tiny(nn.Module):
    """A residual of a linear and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = Conv1D(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def test_a_lowered_module_is_compiled_and_trained() -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    x = torch.randn(4, 6, 16)
    steps = [Observe(), PruneWanda("2:4"), ApplyMasks(), LowerMasked()]
    compiled = compile_sparse(model, steps, example_inputs={"x": x}, calibration=[{"x": x}])
    module = compiled.program.module()
    torch._dynamo.reset()
    fast = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[0], model(x))
    weight = module.get_parameter("first.weight").requires_grad_()
    fast(x)[0].square().sum().backward()
    assert weight.grad is not None
    keep = compiled.program.fact(SparseWeights).masks["first.weight"].keep()
    assert not weight.grad[~keep].any()
    assert weight.grad[keep].any()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lowered_transformer_runs_under_torch_compile(name: str) -> None:
    program = small_program(name)
    lowered = PassManager([PruneMagnitude("2:4"), ApplyMasks(), LowerMasked()])(program).program
    expected = lowered.run(program.example_inputs)["logits"]
    module = lowered.module()
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(module, backend="aot_eager")(**program.example_inputs)
    torch.testing.assert_close(found[0], expected)
    torch._dynamo.reset()
