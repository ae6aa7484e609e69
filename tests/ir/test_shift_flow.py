"""Which biases can be lowered if the linears behind them make up for it, and which cannot.

Every case is a small module in float64. A shift that is found is folded, at random, and the output
must stay. Where none is found, folding the obvious one all the same must move the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.zoo import ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.passes import FindScaleGroups
from zeroskip.passes.base import measure_drift

Forward = Callable[[Any, Tensor], Tensor]
WIDTH, HEADS, SIZE = 8, 4, 4  # Channels of the input, query heads, channels of a head.


class Parts(nn.Module):
    """Linears and norms that a case wires up; 8 wide inside and out, 16 wide in between."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.rms = nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * SIZE)
        self.k = nn.Linear(WIDTH, HEADS * SIZE)
        self.v = nn.Linear(WIDTH, HEADS * SIZE)
        self.bare_v = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.grouped_k = nn.Linear(WIDTH, 2 * SIZE)
        self.grouped_v = nn.Linear(WIDTH, 2 * SIZE)
        self.o = nn.Linear(HEADS * SIZE, WIDTH)
        self.other = nn.Linear(HEADS * SIZE, WIDTH)
        self.fused = Conv1D(3 * HEADS * SIZE, WIDTH)
        self.out = Conv1D(WIDTH, HEADS * SIZE)
        self.sink = nn.Parameter(torch.zeros(HEADS))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def build(forward: Forward, **shared: str) -> Program:
    """Captures a case; `shared` names biases that are another's: `k="v"`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Parts(forward)
        for one, other in shared.items():
            getattr(model, one).bias = getattr(model, other).bias
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.5)
        program = capture(model.double().eval(), {"x": torch.randn(2, 5, WIDTH).double()})
    return FindScaleGroups()(program).program


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def softmax(m: Any, x: Tensor) -> Tensor:
    """Weights of the attention of x to itself."""
    logits = heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)
    return torch.softmax(logits, -1)


def shift(program: Program, group: ScaleGroup, biases: dict[str, Tensor], seed: int = 0) -> Program:
    """Lowers the inputs of a group's consumers at random and makes up for it, in float64.

    Args:
        program: What to change.
        group: Whose consumers.
        biases: For each bias that is lowered, the channel of each element; -1 for none.
        seed: Of the shift.
    """
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(group.size, generator=generator, dtype=torch.float64)
    linears = {linear.name: linear for linear in find_linears(program)}
    new: dict[str, Tensor] = {}

    def add(name: str, amount: Tensor) -> None:
        new[name] = new.get(name, program.weights[name]) + amount

    for name, channels in biases.items():
        add(name, torch.where(channels >= 0, -down[channels.clamp(min=0)], 0.0))
    for consumer in group.consumers:
        linear = linears[consumer.linear]
        inside = consumer.channels >= 0
        gain = linear.weight(program)[:, inside] @ down[consumer.channels[inside]]
        for name in {use.bias for use in linear.uses}:
            assert name is not None
            add(name, gain)
    return program.with_weights(new)


def groups_of(program: Program) -> list[ScaleGroup]:
    return list(program.fact(ScaleGroups).groups.values())


def eager(m: Any, x: Tensor) -> Tensor:
    return m.o(merged(softmax(m, x) @ heads(m.v(x))))


def fused_attention(m: Any, x: Tensor) -> Tensor:
    found = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))
    return m.o(merged(found))


def causal(m: Any, x: Tensor) -> Tensor:
    query, key, value = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(merged(F.scaled_dot_product_attention(query, key, value, is_causal=True)))


def grouped(m: Any, x: Tensor) -> Tensor:
    query, key, value = heads(m.q(x)), heads(m.grouped_k(x)), heads(m.grouped_v(x))
    return m.o(merged(F.scaled_dot_product_attention(query, key, value, enable_gqa=True)))


def windowed(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    mask = (places[:, None] - places[None, :]).abs() < 2
    query, key, value = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


def conv1d(m: Any, x: Tensor) -> Tensor:
    query, key, value = (heads(part) for part in m.fused(x).chunk(3, -1))
    return m.out(merged(F.scaled_dot_product_attention(query, key, value)))


POSITIVE: dict[str, tuple[Forward, list[str]]] = {
    "layer norm before linears": (lambda m, x: m.q(y := m.norm(x)) + m.k(y) + m.v(y), ["norm"]),
    "dropout between": (lambda m, x: m.q(F.dropout(m.norm(x), 0.1, False)), ["norm"]),
    "linear before linear": (lambda m, x: m.o(m.v(x)), ["v"]),
    "two linears behind it": (lambda m, x: m.o(y := m.v(x)) + m.other(y), ["v"]),
    "values, softmax written out": (eager, ["v"]),
    "values, fused attention": (fused_attention, ["v"]),
    "values, causal attention": (causal, ["v"]),
    "values, under a mask that hides no row": (windowed, ["v"]),
    "values, shared by heads": (grouped, ["grouped_v"]),
    "values, out of a fused Conv1D": (conv1d, ["fused"]),
    "added up without a norm": (lambda m, x: m.o(m.v(x) + m.bare_v(x)), ["v"]),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_a_shift_that_is_found_is_exact(name: str) -> None:
    forward, expected = POSITIVE[name]
    program = build(forward)
    shifted = [group for group in groups_of(program) if group.shifts]
    assert [s.parameter for group in shifted for s in group.shifts] == [
        f"{module}.bias" for module in expected
    ]
    for group in shifted:
        biases = {s.parameter: s.channels for s in group.shifts}
        inputs = {"x": torch.randn(3, 7, WIDTH).double()}
        assert measure_drift(program, shift(program, group, biases), inputs) < 1e-12
        # Lowering a bias without making up for it, or the other way round, is felt.
        lowered = shift(program, group, biases)
        for bias in biases:
            half = lowered.with_weights({bias: program.weights[bias]})
            assert measure_drift(program, half, inputs) > 1e-3


def rotated(m: Any, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1]).double()
    angles = torch.cat([angles, angles], -1)

    def turn(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    query, key = turn(heads(m.q(x))), turn(heads(m.k(x)))
    weights = torch.softmax(query @ key.transpose(-1, -2), -1)
    return m.o(merged(weights @ heads(m.bare_v(x))))


def sinks(m: Any, x: Tensor) -> Tensor:
    logits = heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)
    extra = m.sink[None, :, None, None].expand(*logits.shape[:-1], 1)
    weights = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]
    return m.o(merged(weights @ heads(m.v(x))))


def masked(m: Any, x: Tensor) -> Tensor:
    # The last token is padding, which looks at nothing and is looked at by nothing.
    allowed = torch.arange(x.shape[1]) < x.shape[1] - 1
    mask = allowed[:, None] & allowed[None, :]
    query, key, value = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


def dropped_weights(m: Any, x: Tensor) -> Tensor:
    weights = softmax(m, x)
    return m.o(merged(torch.where(weights > 0.2, weights, 0.0) @ heads(m.v(x))))


def columns(m: Any, x: Tensor) -> Tensor:
    logits = heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)
    return m.o(merged(torch.softmax(logits, -2) @ heads(m.v(x))))


# What would be lowered; None where there is no bias to lower.
NEGATIVE: dict[str, tuple[Forward, str | None]] = {
    "a norm without bias": (lambda m, x: m.q(m.rms(x)), None),
    "values without bias": (lambda m, x: m.o(m.bare_v(x)), None),
    "GELU between": (lambda m, x: m.o(F.gelu(m.v(x))), "v.bias"),
    "ReLU between": (lambda m, x: m.o(F.relu(m.v(x))), "v.bias"),
    "gated": (lambda m, x: m.o(m.v(x) * torch.sigmoid(m.k(x))), "v.bias"),
    "the gate": (lambda m, x: m.o(F.silu(m.v(x)) * m.k(x)), "k.bias"),
    "doubled between": (lambda m, x: m.o(2 * m.v(x)), "v.bias"),
    "negated between": (lambda m, x: m.o(-m.v(x)), "v.bias"),
    "a norm between": (lambda m, x: m.q(m.norm(m.o(m.v(x)))), "o.bias"),
    "it is an output too": (lambda m, x: torch.cat([m.o(y := m.v(x)), y], -1), "v.bias"),
    "a nonlinear reader too": (lambda m, x: m.o(y := m.v(x)) + m.other(torch.tanh(y)), "v.bias"),
    "two biases added up": (lambda m, x: m.o(m.v(x) + m.k(x)), "v.bias"),
    "the bias of a difference": (lambda m, x: m.o(m.bare_v(x) - m.v(x)), "v.bias"),
    "keys that are turned": (rotated, None),
    "attention sinks": (sinks, "v.bias"),
    "weights that are dropped": (dropped_weights, "v.bias"),
    "a mask": (masked, "v.bias"),
    "weights that sum up over queries": (columns, "v.bias"),
    "some tokens only": (
        lambda m, x: m.o(torch.cat([m.v(x)[:, :2], m.bare_v(x)[:, 2:]], 1)),
        "v.bias",
    ),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_shift_that_is_not_found_would_be_felt(name: str) -> None:
    forward, bias = NEGATIVE[name]
    program = build(forward)
    groups = groups_of(program)
    lowered = {shift.parameter for group in groups for shift in group.shifts}
    assert bias not in lowered
    if bias is None:
        assert not lowered
        return
    if name == "two biases added up":
        return  # Either could be lowered; neither is chosen.
    channels = torch.arange(len(program.weights[bias]))
    readers = [g for g in groups if g.consumers and g.size == len(channels)]
    for group in readers:
        assert measure_drift(program, shift(program, group, {bias: channels})) > 1e-3
    if not readers:  # Not even a scale: the linear behind it makes up for the shift.
        behind = "q" if bias == "o.bias" else "o"
        down = torch.randn(len(channels), generator=torch.Generator().manual_seed(0)).double()
        changed = {
            bias: program.weights[bias] - down,
            f"{behind}.bias": program.weights[f"{behind}.bias"]
            + program.weights[f"{behind}.weight"] @ down,
        }
        assert measure_drift(program, program.with_weights(changed)) > 1e-3


@pytest.mark.parametrize("other", ["q", "k"])
def test_a_bias_that_something_else_reads_too_stays(other: str) -> None:
    program = build(eager, **{other: "v"})
    assert [group.name for group in groups_of(program) if group.shifts] == []


def test_a_bias_of_two_linears_shifts_the_readers_of_both() -> None:
    program = build(lambda m, x: m.o(m.v(x)) + m.other(m.k(x)), k="v")
    (group,) = [group for group in groups_of(program) if group.shifts]
    assert {consumer.linear for consumer in group.consumers} == {"o.weight", "other.weight"}
    biases = {s.parameter: s.channels for s in group.shifts}
    assert measure_drift(program, shift(program, group, biases)) < 1e-12


@pytest.mark.parametrize(
    ("name", "least"), [("gpt2", 4), ("opt", 4), ("vit", 7), ("whisper_encoder", 4), ("t5", 0)]
)
def test_shifts_of_whole_models(name: str, least: int) -> None:
    entry = ZOO[name]
    inputs = entry.inputs()
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    program = FindScaleGroups()(capture(entry.model(dtype=torch.float64), inputs)).program
    linears = {linear.name: linear for linear in find_linears(program)}
    found = 0
    for number, group in enumerate(groups_of(program)):
        readers = [linears[consumer.linear] for consumer in group.consumers]
        if not group.shifts or any(use.bias is None for x in readers for use in x.uses):
            continue
        biases = {s.parameter: s.channels for s in group.shifts}
        program, before = shift(program, group, biases, number), program
        assert not torch.equal(program.weights[group.shifts[0].parameter],
                               before.weights[group.shifts[0].parameter])  # fmt: skip
        other = entry.inputs(*entry.sizes[1], padded=True)
        other = {n: v.double() if v.is_floating_point() else v for n, v in other.items()}
        assert measure_drift(before, program, other) < 1e-10
        found += 1
    assert (found >= least) if least else (found == 0)
