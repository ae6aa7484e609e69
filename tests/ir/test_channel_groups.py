"""Which channels can change places, on modules made for one question each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from tests.renaming import rename_modules
from tests.small import small_model, small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.channel_groups import ChannelGroup, ChannelGroups, find_channel_groups
from zeroskip.ir.channel_permutation import permute_channels
from zeroskip.ir.program import Program
from zeroskip.passes.base import measure_drift


class Hidden(nn.Module):
    """up, something of 16 channels, down."""

    scale: Tensor

    def __init__(self, middle: Callable[[Hidden, Tensor], Tensor], down: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.gate = nn.Linear(12, 16)
        self.down = nn.Linear(down, 12)
        self.slope = nn.Parameter(torch.rand(16) + 0.5)
        self.single = nn.Parameter(torch.rand(1) + 0.5)
        self.register_buffer("scale", torch.linspace(1, 2, 16))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.middle(self, x)
        out: Tensor = self.down(hidden)
        return x + out


def captured(middle: Callable[[Hidden, Tensor], Tensor], down: int = 16) -> Program:
    torch.manual_seed(0)
    module = Hidden(middle, down).eval()
    return capture(module, {"x": torch.randn(2, 5, 12)})


def of_down(program: Program) -> tuple[list[ChannelGroup], str | None]:
    found = find_channel_groups(program)
    groups = [g for g in found.groups if any(n.name == "down.weight" for n, _ in g.consumers)]
    return groups, found.refusals.get("down.weight")


def drift_of(program: Program, group: ChannelGroup, seed: int = 0) -> float:
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))
    assert not torch.equal(order, torch.arange(group.size))
    return measure_drift(program, permute_channels(program, [(group, order)]))


ALLOWED: dict[str, tuple[Callable[[Hidden, Tensor], Tensor], set[str]]] = {
    "relu": (lambda m, x: torch.relu(m.up(x)), {"up.weight", "up.bias"}),
    "gelu": (lambda m, x: functional.gelu(m.up(x)), {"up.weight", "up.bias"}),
    "gate": (
        lambda m, x: functional.silu(m.gate(x)) * m.up(x),
        {"up.weight", "up.bias", "gate.weight", "gate.bias"},
    ),
    "own slopes": (
        lambda m, x: torch.tanh(m.up(x) * m.slope),
        {"up.weight", "up.bias", "slope"},
    ),
    "one slope": (lambda m, x: m.up(x) * m.single + m.single, {"up.weight", "up.bias"}),
    "flipped": (lambda m, x: torch.relu(m.up(x).flip(-1)), {"up.weight", "up.bias"}),
    "a choice": (
        lambda m, x: torch.where(x[..., :1] > 0, m.up(x), m.gate(x)),
        {"up.weight", "up.bias", "gate.weight", "gate.bias"},
    ),
    "a mean of tokens": (
        lambda m, x: m.up(x).mean(1, keepdim=True).expand(-1, x.shape[1], -1),
        {"up.weight", "up.bias"},
    ),
    "halves against each other": (
        lambda m, x: (lambda h: h[..., :8] * torch.sigmoid(h[..., 8:]))(m.up(x)),
        {"up.weight", "up.bias"},
    ),
    "a product with all tokens": (
        lambda m, x: torch.softmax(x @ x.transpose(1, 2), -1) @ m.up(x),
        {"up.weight", "up.bias"},
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_hidden_units_can_change_places(name: str) -> None:
    middle, producers = ALLOWED[name]
    program = captured(middle, 8 if name.startswith("halves") else 16)
    (group,), reason = of_down(program)
    assert reason is None
    assert group.size == (8 if name.startswith("halves") else 16)
    assert {member.parameter for member in group.members} == producers | {"down.weight"}
    assert drift_of(program, group) < 1e-6
    # Leave one member out, and it is another function.
    for missing in group.members:
        rest = tuple(member for member in group.members if member is not missing)
        broken = ChannelGroup(group.name, group.size, rest, group.consumers, group.linears)
        assert drift_of(program, broken) > 1e-3, missing.parameter


REFUSED: dict[str, tuple[Callable[[Hidden, Tensor], Tensor], str]] = {
    "a fixed scale of each": (lambda m, x: m.up(x) * m.scale, "tells its channels apart"),
    "a softmax": (lambda m, x: torch.softmax(m.up(x), -1), "a given order"),
    "a cumulative sum": (lambda m, x: m.up(x).cumsum(-1), "a given order"),
    "a norm": (lambda m, x: functional.layer_norm(m.up(x), (16,)), "reduced together"),
    "a root mean square": (
        lambda m, x: m.up(x) * m.up(x).pow(2).mean(-1, keepdim=True).rsqrt(),
        "reduced together",
    ),
    "neighbours are joined": (
        lambda m, x: m.up(x) + m.up(x).roll(1, -1),
        "used in a way of its own",
    ),
    "the input is added": (
        lambda m, x: m.up(x) + functional.pad(x, (0, 4)),
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_are_told_apart_stay(name: str) -> None:
    middle, words = REFUSED[name]
    groups, reason = of_down(captured(middle))
    assert groups == []
    assert reason is not None
    assert words in reason


def test_halves_that_are_used_unlike_each_other_are_two_blocks() -> None:
    def middle(m: Hidden, x: Tensor) -> Tensor:
        first, second = m.up(x).chunk(2, -1)
        return torch.cat([torch.relu(first), torch.tanh(second)], -1)

    program = captured(middle)
    groups, reason = of_down(program)
    assert reason is None
    assert [group.size for group in groups] == [8, 8]
    columns = [group.consumers[0][1].places[0].tolist() for group in groups]
    assert columns == [list(range(8)), list(range(8, 16))]
    assert all(drift_of(program, group) < 1e-6 for group in groups)


def test_some_channels_may_stay_while_others_move() -> None:
    def middle(m: Hidden, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(m.up(x)[..., :10]), torch.softmax(m.gate(x)[..., :6], -1)], -1)

    program = captured(middle)
    (group,), reason = of_down(program)
    assert group.size == 10
    assert str(reason).startswith("6 of 16: ")
    assert drift_of(program, group) < 1e-6


def test_two_readers_of_one_value_move_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(self.up(x))
            return self.a(hidden), self.b(hidden)

    program = capture(Two().eval(), {"x": torch.randn(2, 12)})
    (group,) = find_channel_groups(program).groups
    assert [linear.name for linear, _ in group.consumers] == ["a.weight", "b.weight"]
    assert drift_of(program, group) < 1e-6


def test_a_value_that_leaves_the_program_keeps_its_order() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(self.up(x))
            return self.down(hidden), hidden

    found = find_channel_groups(capture(Leaves().eval(), {"x": torch.randn(2, 12)}))
    assert found.groups == ()
    assert "leaves the program" in found.refusals["down.weight"]
    assert "enters the program" in found.refusals["up.weight"]


def by_consumer(found: ChannelGroups) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {}
    for group in found.groups:
        for linear, axis in group.consumers:
            sizes.setdefault(linear.name.partition("layers.0.")[2], []).append(len(axis.places))
    return sizes


def test_heads_that_share_a_value_move_as_one() -> None:
    # Two value heads, each read by two query heads.
    found = find_channel_groups(small_program("llama"))
    assert by_consumer(found) == {"self_attn.o_proj.weight": [2, 2], "mlp.down_proj.weight": [1]}
    heads = [group for group in found.groups if "o_proj" in group.name]
    assert heads[0].consumers[0][1].places.tolist() == [[*range(16)], [*range(16, 32)]]
    moved = {member.parameter for group in found.groups for member in group.members}
    assert not any("q_proj" in name or "k_proj" in name for name in moved)


def test_nothing_depends_on_names() -> None:
    model = small_model("llama")
    inputs = small_program("llama").example_inputs
    expected = find_channel_groups(small_program("llama"))
    names = rename_modules(model)
    found = find_channel_groups(capture(model, inputs))
    assert len(found.groups) == len(expected.groups)
    for old, new in zip(expected.groups, found.groups, strict=True):
        assert {names[m.parameter] for m in old.members} == {m.parameter for m in new.members}
        assert old.size == new.size


def test_layers_that_share_their_weights_move_as_one() -> None:
    torch.manual_seed(0)
    config = hf.AlbertConfig(
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=112,
        vocab_size=160,
    )
    ids = torch.randint(3, 160, (2, 9))
    program = capture(hf.AlbertModel(config).eval(), {"input_ids": ids})
    groups = find_channel_groups(program).groups
    assert sorted(group.size for group in groups) == [16] * 4 + [112]
    assert all(drift_of(program, group) < 1e-5 for group in groups)
