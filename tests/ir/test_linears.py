"""Linears are found by what they compute, whatever operator spells them and whatever they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.renaming import rename_modules
from tests.zoo import ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Roles
from zeroskip.ir.linears import Linear, find_linears, masked_sources
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, find_roles, select_linears

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Wrapped(nn.Module):
    """A module around a function of x, a weight of any shape and a bias."""

    def __init__(self, function: Function, weight: tuple[int, ...], bias: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(weight))
        self.b = nn.Parameter(torch.randn(bias))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


def program_of(
    function: Function, weight: tuple[int, ...], x: tuple[int, ...] = (4, 8), bias: int = 6
) -> Program:
    model = Wrapped(function, weight, bias).eval()
    return capture(model, {"x": torch.randn(x)}, dynamic_shapes={"x": {}})


OUT_IN, IN_OUT = (6, 8), (8, 6)

# function, shape of the parameter, whether it is stored [in, out], name of the bias
SPELLINGS: dict[str, tuple[Function, tuple[int, ...], bool, str | None]] = {
    "linear": (lambda x, w, b: F.linear(x, w), OUT_IN, False, None),
    "linear-bias": (lambda x, w, b: F.linear(x, w, b), OUT_IN, False, "b"),
    "linear-transposed": (lambda x, w, b: F.linear(x, w.t(), b), IN_OUT, True, "b"),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), IN_OUT, True, "b"),
    "addmm-t": (lambda x, w, b: torch.addmm(b, x, w.t()), OUT_IN, False, "b"),
    "matmul": (lambda x, w, b: x @ w, IN_OUT, True, None),
    "matmul-T": (lambda x, w, b: x @ w.T, OUT_IN, False, None),
    "matmul-t": (lambda x, w, b: x @ w.t(), OUT_IN, False, None),
    "matmul-mT": (lambda x, w, b: x @ w.mT, OUT_IN, False, None),
    "matmul-transpose": (lambda x, w, b: x @ w.transpose(-1, 0), OUT_IN, False, None),
    "matmul-permute": (lambda x, w, b: x @ w.permute(1, 0), OUT_IN, False, None),
    "matmul-twice": (lambda x, w, b: x @ w.t().contiguous().T.T, OUT_IN, False, None),
    "mm": (lambda x, w, b: torch.mm(x, w), IN_OUT, True, None),
    "mm-t": (lambda x, w, b: torch.mm(x, w.t()), OUT_IN, False, None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_linear(spelling: str) -> None:
    function, shape, transposed, bias = SPELLINGS[spelling]
    program = program_of(function, shape)
    (linear,) = find_linears(program)
    assert (linear.name, linear.parameter, linear.expert) == ("w", "w", None)
    assert (linear.shape, linear.transposed) == ((6, 8), transposed)
    (use,) = linear.uses
    assert use.bias == bias
    assert use.activation.target == "x"
    x = program.example_inputs["x"]
    expected = F.linear(x, linear.weight(program), None if bias is None else program.weights["b"])
    torch.testing.assert_close(program.run({"x": x})["output_0"], expected)


def test_conv1d_keeps_more_than_two_dimensions() -> None:
    program = capture(Conv1D(6, 8).eval(), {"x": torch.randn(2, 3, 8)})
    (linear,) = find_linears(program)
    assert (linear.shape, linear.transposed, linear.uses[0].bias) == ((6, 8), True, "bias")


@pytest.mark.parametrize(
    ("function", "shape", "transposed"),
    [
        (lambda x, w, b: torch.bmm(x, w), (3, 8, 6), True),
        (lambda x, w, b: torch.bmm(x, w.transpose(1, 2)), (3, 6, 8), False),
        (lambda x, w, b: torch.bmm(x, w.mT), (3, 6, 8), False),
    ],
)
def test_bmm_with_a_stack_of_weights_is_one_linear_per_expert(
    function: Function, shape: tuple[int, ...], transposed: bool
) -> None:
    program = program_of(function, shape, x=(3, 4, 8))
    linears = find_linears(program)
    assert [linear.name for linear in linears] == ["w[0]", "w[1]", "w[2]"]
    assert [linear.expert for linear in linears] == [0, 1, 2]
    assert {(linear.shape, linear.transposed) for linear in linears} == {((6, 8), transposed)}
    x = program.example_inputs["x"]
    found = torch.stack([F.linear(x[e], n.weight(program)) for e, n in enumerate(linears)])
    torch.testing.assert_close(program.run({"x": x})["output_0"], found)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_grouped_experts(name: str, captured: Callable[[str], Program]) -> None:
    program = captured(name)
    experts = [n for n in find_linears(program) if n.expert is not None]
    width = {"mixtral": 112, "qwen3_moe": 48}[name]
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        found = {n.name: n for n in experts if n.name.startswith(prefix)}
        assert list(found) == [
            f"{prefix}.{leaf}[{e}]" for leaf in ("gate_up_proj", "down_proj") for e in range(4)
        ]
        for n in found.values():
            assert n.shape == ((2 * width, 64) if "gate_up" in n.name else (64, width))
            (use,) = n.uses
            assert use.offsets is not None
            assert torch.equal(n.weight(program), n.view(program.weights[n.parameter]))
    assert len(experts) == 16


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w, b: F.linear(x, 1 + w), OUT_IN),
        (lambda x, w, b: F.linear(x, w[:4]), OUT_IN),
        (lambda x, w, b: F.linear(x, w * 2), OUT_IN),
        (lambda x, w, b: F.linear(x, w.flip(0)), OUT_IN),
        (lambda x, w, b: F.linear(x, w.reshape(6, 8)), (8, 6)),
        (lambda x, w, b: x @ w[0], (3, 8, 6)),
        (lambda x, w, b: torch.addmm(b, x, w, alpha=2.0), IN_OUT),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0.5), IN_OUT),
        (lambda x, w, b: x @ w @ w.T, IN_OUT),
        (lambda x, w, b: x @ x.T, OUT_IN),
        (lambda x, w, b: w @ x.T, OUT_IN),
        (lambda x, w, b: torch.matmul(x, w), (3, 8, 6)),
        (lambda x, w, b: F.embedding(x.long().abs() % 6, w), OUT_IN),
        (lambda x, w, b: F.linear(w, w), OUT_IN),
    ],
    ids=[
        "plus-one",
        "slice",
        "scaled",
        "flipped",
        "reshaped",
        "one-of-a-stack",
        "addmm-alpha",
        "addmm-beta",
        "both-orientations",
        "no-parameter",
        "weight-on-the-left",
        "batched-matmul",
        "embedding",
        "of-a-parameter",
    ],
)
def test_what_is_not_a_linear(function: Function, shape: tuple[int, ...]) -> None:
    assert find_linears(program_of(function, shape)) == []


def test_a_shared_weight_is_one_linear_with_several_uses() -> None:
    program = program_of(lambda x, w, b: F.linear(F.linear(x, w).relu(), w), (8, 8))
    (linear,) = find_linears(program)
    assert len(linear.uses) == 2
    assert program.fact(Roles) == Roles()


def test_a_weight_that_something_else_reads_is_shared() -> None:
    program = program_of(lambda x, w, b: F.linear(x, w) + w.sum(), OUT_IN)
    assert program.fact(Roles).shared == {"w"}
    transposed = program_of(lambda x, w, b: x @ w.t() + w.t().sum(), OUT_IN)
    assert transposed.fact(Roles).shared == {"w"}


# Roles

_LAYERS = ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
HEADS = {
    "llama": "lm_head.weight",
    "llama_tied": "model.embed_tokens.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "qwen2": "lm_head.weight",
    "qwen3": "lm_head.weight",
    "mistral": "lm_head.weight",
    "gemma2": "model.embed_tokens.weight",
    "gemma3": "model.embed_tokens.weight",
    "phi3": "lm_head.weight",
    "gpt2": "transformer.wte.weight",
    "gpt_neox": "lm_head.weight",
    "falcon": "transformer.word_embeddings.weight",
    "mixtral": "lm_head.weight",
    "qwen3_moe": "lm_head.weight",
    "t5": "shared.weight",
}
ROUTERS = {"mixtral": _LAYERS, "qwen3_moe": _LAYERS}


def test_roles_over_the_zoo(arch: str, captured: Callable[[str], Program]) -> None:
    roles = captured(arch).fact(Roles)
    assert roles.heads == ({HEADS[arch]} if arch in HEADS else set())
    assert roles.routers == set(ROUTERS.get(arch, ()))
    assert roles.shared == set()


def test_every_projection_of_the_model_is_a_linear(
    arch: str, captured: Callable[[str], Program]
) -> None:
    program = captured(arch)
    assert program.model is not None
    linears = {n.name: n for n in find_linears(program)}
    modules = {
        f"{name}.weight": module
        for name, module in program.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in program.read_weights()
    }
    assert modules
    assert modules.keys() <= linears.keys()
    for name, module in modules.items():
        transposed = isinstance(module, Conv1D)
        shape = tuple(module.weight.shape)
        assert linears[name].transposed == transposed
        assert linears[name].shape == (shape[::-1] if transposed else shape)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_roles_do_not_depend_on_names(name: str, captured: Callable[[str], Program]) -> None:
    model = ZOO[name].model()
    renamed = rename_modules(model)
    assert not any("lm_head" in new or "gate." in new for new in renamed.values())
    program, original = capture(model, ZOO[name].inputs()), captured(name).fact(Roles)
    roles = program.fact(Roles)
    assert roles.heads == {renamed[head] for head in original.heads}
    assert roles.routers == {renamed[router] for router in original.routers}
    assert roles.shared == set()


def test_a_name_gives_no_role() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(8, 8)
            self.gate = nn.Linear(8, 8)
            self.router = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.lm_head(self.router(self.gate(x)).relu())
            return result

    program = capture(Named().eval(), {"x": torch.randn(2, 8)})
    assert find_roles(program) == Roles()


# Selection


def names(linears: list[Linear]) -> list[str]:
    return [linear.name for linear in linears]


def test_heads_and_routers_are_left_alone(captured: Callable[[str], Program]) -> None:
    taken = names(select_linears(captured("mixtral")))
    assert len(taken) == 2 * (4 + 8)
    assert not any(name.endswith(("gate.weight", "lm_head.weight")) for name in taken)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("lm_head",), (), ["lm_head.weight"]),
        (("lm_head.weight",), (), ["lm_head.weight"]),
        (("*.1.mlp.down_proj", "lm_head"), (), ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"]),
        (("*.0.*",), ("*proj",), []),
        (("*.0.mlp.*",), ("*up*",), [f"model.layers.0.mlp.{k}_proj.weight" for k in ("gate", "down")]),
        ((), ("*.mlp.*", "*.1.*", "*.[qkv]_proj"), ["model.layers.0.self_attn.o_proj.weight"]),
        (("*",), ("model.*",), ["lm_head.weight"]),
    ],
)  # fmt: skip
def test_include_and_exclude(
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    expected: list[str],
    captured: Callable[[str], Program],
) -> None:
    assert names(select_linears(captured("llama"), include, exclude)) == expected


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_names(
    where: str, captured: Callable[[str], Program]
) -> None:
    options: dict[str, Any] = {"include": (), "exclude": (), where: ("*.q_porj",)}
    with pytest.raises(CompileError) as raised:
        check_selection(captured("llama"), **options)
    assert "'*.q_porj' matches no linear" in str(raised.value)
    assert "model.layers.0.self_attn.q_proj.weight" in str(raised.value)
    assert str(raised.value).endswith(", ...")


def test_leaving_everything_out_is_refused(captured: Callable[[str], Program]) -> None:
    with pytest.raises(CompileError, match="no linear is left"):
        check_selection(captured("llama"), (), ("model.*",))
    check_selection(captured("llama"), ("lm_head",), ())


def test_masked_sources_hold_masks_of_several_experts_and_compose() -> None:
    program = program_of(lambda x, w, b: torch.bmm(x, w), (3, 8, 6), x=(3, 4, 8))
    first = torch.ones(6, 8, dtype=torch.bool)
    first[0, 1] = False
    second = torch.ones(6, 8, dtype=torch.bool)
    second[5, 7] = False
    once = program.with_weights(masked_sources(program, {"w[0]": first, "w[2]": second}))
    other = torch.ones(6, 8, dtype=torch.bool)
    other[2, 2] = False
    twice = once.with_weights(masked_sources(once, {"w[0]": other}))
    expected = program.weights["w"].clone()
    expected[0, 1, 0] = expected[2, 7, 5] = 0
    assert torch.equal(once.weights["w"], expected)
    expected[0, 2, 2] = 0
    assert torch.equal(twice.weights["w"], expected)
    assert not (program.weights["w"] == 0).any()
