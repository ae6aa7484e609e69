"""Groups of channel scales over the zoo: what each holds, that no output feels them, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from tests.renaming import rename_modules
from tests.scaling import fold, leaving_out, random_scales
from tests.zoo import TRANSLATION, ZOO, Inputs, randomize
from zeroskip.ir.capture import capture
from zeroskip.ir.facts import same_facts
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import (
    Member,
    ScaleGroup,
    ScaleGroups,
    find_scale_groups,
)
from zeroskip.passes.base import measure_drift, relative_drift

NUMBER_OF_GROUPS = {
    # Two layers of: norm -> q, k, v; q - k; v -> o; norm -> gate, up; up -> down. Norm -> head.
    "llama": 11,
    "llama_tied": 10,  # The head is the embedding.
    "qwen2": 11,
    "qwen3": 11,  # q_norm - k_norm instead of q - k.
    "mistral": 11,
    "gemma2": 10,
    "gemma3": 10,
    "phi3": 11,
    "mixtral": 11,
    "qwen3_moe": 11,
    # fc1 -> ReLU -> fc2, or nothing behind a GELU.
    "opt": 10,
    "gpt2": 8,
    "gpt_neox": 9,
    "falcon": 6,  # One norm in front of attention and MLP.
    # Nothing but q - k and v -> o: every norm is followed by a residual.
    "bert": 4,
    "roberta": 4,
    "distilbert": 4,
    "vit": 9,
    "whisper_encoder": 8,
    "clip": 17,
    # Encoder layers: 5. Decoder layers: 8. The encoder's last values leave the program.
    "t5": 26,
    "mlp": 2,
    "convnet": 1,
}

# Keys that are all moved alike are the same to a softmax, where positions do not turn them.
INERT = {
    "gpt2": "attn.c_attn.bias",  # Its second third: queries and values are needed.
    "opt": "self_attn.k_proj.bias",
    "bert": "attention.self.key.bias",
    "roberta": "attention.self.key.bias",
    "distilbert": "attention.k_lin.bias",
    "vit": "attention.k_proj.bias",
    "clip": "self_attn.k_proj.bias",
}


@pytest.fixture(scope="session")
def grouped(captured: Callable[[str], Program]) -> Callable[[str], ScaleGroups]:
    """Returns the groups of an entry of the zoo; each is analysed once."""
    return functools.cache(lambda name: find_scale_groups(captured(name)))


Grouped = Callable[[str], ScaleGroups]
Captured = Callable[[str], Program]


def other_inputs(arch: str) -> Inputs:
    batch, sequence = ZOO[arch].sizes[1]
    return ZOO[arch].inputs(batch, sequence, padded=True)


def consumers(found: ScaleGroups, producer: str) -> list[str]:
    """The linears behind a parameter that only producers of one group have."""
    (group,) = (g for n, g in found.groups.items() if n.startswith(f"{producer} -> "))
    return [consumer.linear for consumer in group.consumers]


def member(group: ScaleGroup, parameter: str, axis: int | None) -> Member:
    (one,) = (m for m in group.members if (m.parameter, m.axis) == (parameter, axis))
    return one


# Over the zoo


def test_every_architecture_has_its_groups(arch: str, grouped: Grouped) -> None:
    assert len(grouped(arch).groups) == NUMBER_OF_GROUPS[arch]


def test_groups_are_well_formed(arch: str, grouped: Grouped, captured: Captured) -> None:
    program, found = captured(arch), grouped(arch)
    assert found.check(program) is None
    order = {linear.name: i for i, linear in enumerate(find_linears(program))}
    for name, group in found.groups.items():
        assert name == group.name
        touched = torch.zeros(group.size, dtype=torch.long)
        for part in group.members:
            assert part.channels.shape == part.exponents.shape
            assert torch.equal(part.channels >= 0, part.exponents != 0)
            inside = part.channels[part.channels >= 0]
            touched.index_add_(0, inside, torch.ones_like(inside))
        assert (touched >= 2).all()  # A scale cancels in another place.
        places = [order[consumer.linear] for consumer in group.consumers]
        assert places == sorted(set(places))
        assert {consumer.linear for consumer in group.consumers} <= set(group.linears)
        for consumer in group.consumers:
            linear = find_linears(program)[order[consumer.linear]]
            assert consumer.channels.shape == (linear.in_features,)


def test_inputs_of_consumers_are_multiplied(
    arch: str, grouped: Grouped, captured: Captured
) -> None:
    linears = {linear.name: linear for linear in find_linears(captured(arch))}
    for group in grouped(arch).groups.values():
        for consumer in group.consumers:
            linear = linears[consumer.linear]
            axis = (0 if linear.transposed else 1) + (linear.expert is not None)
            exponents = member(group, linear.parameter, axis).exponents
            assert (exponents >= 0).all()
            assert (exponents > 0).any()


def test_no_output_feels_the_scales(arch: str, grouped: Grouped, captured: Captured) -> None:
    program, inputs = captured(arch), other_inputs(arch)
    before, groups = program.run(inputs), grouped(arch).groups.values()

    # Every group moves: its scales are log-uniform, between 1/e and e.
    for seed, group in enumerate(groups):
        size = random_scales(group, seed).abs().log()
        assert float(size.abs().max()) <= 1
        assert float(size.std()) > 0.3 or group.size < 8
        folded = fold(program, [group])
        assert all(
            not torch.equal(folded.weights[name], program.weights[name])
            for name in group.parameters
        )

    def drift(powers_of_two: bool) -> float:
        after = fold(program, groups, powers_of_two=powers_of_two).run(inputs)
        return max(relative_drift(before[key], after[key]) for key in before)

    assert drift(powers_of_two=False) < 5e-6
    # Powers of two do not round, unless a gain is 1 + w: every bit stays.
    exact = drift(powers_of_two=True)
    assert exact < 5e-6 if arch.startswith("gemma") else exact == 0


def test_every_member_is_needed(arch: str, grouped: Grouped, captured: Captured) -> None:
    program, inputs = captured(arch), other_inputs(arch)
    before = program.run(inputs)
    inert, parts = set(), 0
    for group in grouped(arch).groups.values():
        for parameter, rest in leaving_out(group):
            parts += 1
            after = fold(program, [rest]).run(inputs)
            drift = max(relative_drift(before[key], after[key]) for key in before)
            if drift < 1e-5:
                inert.add(parameter)
            else:
                assert drift > 1e-3, parameter
    assert parts >= 2 * NUMBER_OF_GROUPS[arch]
    expected = {name for name in program.weights if name.endswith(INERT.get(arch, "nothing"))}
    assert inert == expected


def test_in_float64_nothing_is_felt() -> None:
    model, inputs = ZOO["qwen2"].model(dtype=torch.float64), ZOO["qwen2"].inputs()
    program = capture(model, inputs)
    folded = fold(program, find_scale_groups(program).groups.values())
    assert measure_drift(program, folded, other_inputs("qwen2")) < 1e-12


# What is found


def test_the_groups_of_a_llama_layer(grouped: Grouped) -> None:
    found = grouped("llama")
    layer, attention = "model.layers.0", "model.layers.0.self_attn"
    names = [name for name in found.groups if "layers.1" not in name]
    assert names == [
        f"{layer}.input_layernorm.weight -> {attention}.q_proj.weight",
        f"{attention}.k_proj.weight -> {attention}.q_proj.weight",
        f"{attention}.v_proj.weight -> {attention}.o_proj.weight",
        f"{layer}.post_attention_layernorm.weight -> {layer}.mlp.gate_proj.weight",
        f"{layer}.mlp.up_proj.weight -> {layer}.mlp.down_proj.weight",
        "model.norm.weight -> lm_head.weight",
    ]
    norm, rotary, values, mlp_norm, mlp, head = (found.groups[name] for name in names)
    assert [group.size for group in (norm, rotary, values, mlp_norm, mlp, head)] == [
        64,
        24,  # 2 key heads, 12 pairs each
        48,
        64,
        112,
        64,
    ]
    assert not any(group.positive for group in found.groups.values())
    assert [c.linear for c in norm.consumers] == [
        f"{attention}.{p}_proj.weight" for p in ("q", "k", "v")
    ]
    assert rotary.consumers == ()
    assert [c.linear for c in mlp_norm.consumers] == [
        f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up")
    ]
    assert norm.parameters == (
        f"{layer}.input_layernorm.weight",
        *(f"{attention}.{p}_proj.weight" for p in ("q", "k", "v")),
    )
    assert norm.linears == tuple(f"{attention}.{p}_proj.weight" for p in ("q", "k", "v"))


def test_query_heads_share_the_scales_of_their_key_head(grouped: Grouped) -> None:
    attention = "model.layers.0.self_attn"
    values = grouped("llama").groups[f"{attention}.v_proj.weight -> {attention}.o_proj.weight"]
    (output,) = values.consumers
    width = torch.arange(24)
    expected = torch.cat([width, width, width + 24, width + 24])
    assert torch.equal(output.channels, expected)
    assert torch.equal(member(values, f"{attention}.v_proj.weight", 0).channels, torch.arange(48))
    pairs = grouped("llama").groups[f"{attention}.k_proj.weight -> {attention}.q_proj.weight"]
    keys = member(pairs, f"{attention}.k_proj.weight", 0).channels.reshape(2, 2, 12)
    assert torch.equal(keys[:, 0], keys[:, 1])
    assert len(keys.unique()) == 24


def test_norms_of_queries_and_keys_scale_in_their_place(grouped: Grouped) -> None:
    attention = "model.layers.0.self_attn"
    names = [name for name in grouped("qwen3").groups if name.startswith(attention)]
    assert names == [
        f"{attention}.k_norm.weight -> {attention}.q_norm.weight",
        f"{attention}.v_proj.weight -> {attention}.o_proj.weight",
    ]
    assert grouped("qwen3").groups[names[0]].size == 12


def test_fused_projections_scale_in_part(grouped: Grouped) -> None:
    found, layer = grouped("phi3"), "model.layers.0"
    fused = f"{layer}.self_attn.qkv_proj.weight"
    values = found.groups[f"{fused} -> {layer}.self_attn.o_proj.weight"]
    rows = member(values, fused, 0).channels
    assert (rows[:96] == -1).all()  # 4 query heads and 2 key heads, 16 wide
    assert torch.equal(rows[96:], torch.arange(32))
    queries = found.groups[f"{fused} -> {fused}"]
    exponents = member(queries, fused, 0).exponents
    assert exponents.tolist() == [1] * 64 + [-1] * 32 + [0] * 32
    mlp = found.groups[f"{layer}.mlp.gate_up_proj.weight -> {layer}.mlp.down_proj.weight"]
    rows = member(mlp, f"{layer}.mlp.gate_up_proj.weight", 0).channels
    assert (rows[:112] == -1).all()
    assert torch.equal(rows[112:], torch.arange(112))
    refused = {(r.linear, r.side): r.reason for r in found.refusals}
    reason = refused[f"{layer}.mlp.gate_up_proj.weight", "outputs"]
    assert reason.startswith("112 of 224: silu at silu")


def test_interleaved_fused_projections_scale_head_by_head(grouped: Grouped) -> None:
    fused = "gpt_neox.layers.0.attention.query_key_value"
    name = f"{fused}.weight -> gpt_neox.layers.0.attention.dense.weight"
    rows = member(grouped("gpt_neox").groups[name], f"{fused}.weight", 0).channels
    heads = rows.reshape(4, 3, 16)
    assert (heads[:, :2] == -1).all()
    assert torch.equal(heads[:, 2].flatten(), torch.arange(64))


def test_transposed_weights_scale_along_their_other_axis(grouped: Grouped) -> None:
    group = grouped("gpt2").groups[
        "transformer.h.0.ln_1.weight -> transformer.h.0.attn.c_attn.weight"
    ]
    assert [(m.parameter, m.axis) for m in group.members] == [
        ("transformer.h.0.ln_1.weight", None),
        ("transformer.h.0.ln_1.bias", None),
        ("transformer.h.0.attn.c_attn.weight", 0),
    ]


def test_gains_of_gemma_are_one_plus_the_weight(grouped: Grouped) -> None:
    name = "model.layers.0.input_layernorm.weight"
    groups = grouped("gemma2").groups
    gain = member(groups[f"{name} -> model.layers.0.self_attn.q_proj.weight"], name, None)
    assert (gain.slope, gain.offset) == (1, 1)
    w = torch.linspace(-0.5, 0.5, 64)
    scaled = gain.scaled(w, torch.full((64,), 4.0))
    torch.testing.assert_close(1 + scaled, (1 + w) / 4)


def test_a_router_belongs_to_the_group_of_its_norm(grouped: Grouped) -> None:
    layer = "model.layers.0"
    behind = consumers(grouped("mixtral"), f"{layer}.post_attention_layernorm.weight")
    assert behind == [
        f"{layer}.mlp.gate.weight",
        *(f"{layer}.mlp.experts.gate_up_proj[{e}]" for e in range(4)),
    ]


def test_every_expert_has_scales_of_its_own(grouped: Grouped) -> None:
    experts = "model.layers.0.mlp.experts"
    group = grouped("mixtral").groups[f"{experts}.gate_up_proj -> {experts}.down_proj"]
    assert group.size == 4 * 112
    up, down = group.members
    assert (up.axis, up.stacked, down.axis, down.stacked) == (1, True, 2, True)
    assert up.channels.shape == (4, 224)
    assert torch.equal(down.channels, torch.arange(448).reshape(4, 112))
    assert torch.equal(up.channels[:, 112:], down.channels)
    assert [c.linear for c in group.consumers] == [f"{experts}.down_proj[{e}]" for e in range(4)]
    for e, consumer in enumerate(group.consumers):
        assert torch.equal(consumer.channels, torch.arange(112) + 112 * e)


class Logits(nn.Module):
    """A T5 that does not return the values of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 2, "num_layers": 1}
        config = hf.T5Config(**sizes, **TRANSLATION, num_decoder_layers=2, vocab_size=160)
        self.model = hf.T5ForConditionalGeneration(config)
        randomize(self)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask, decoder_input_ids).logits
        return logits


def test_the_encoder_ends_in_all_cross_attention() -> None:
    program = capture(Logits().eval(), ZOO["t5"].inputs())
    found = find_scale_groups(program)
    assert consumers(found, "model.encoder.final_layer_norm.weight") == [
        f"model.decoder.block.{block}.layer.1.EncDecAttention.{part}.weight"
        for block in (0, 1)
        for part in ("k", "v")
    ]
    folded = fold(program, found.groups.values(), powers_of_two=True)
    assert measure_drift(program, folded, other_inputs("t5")) == 0


def test_parallel_branches_share_a_norm(grouped: Grouped) -> None:
    layer = "transformer.h.0"
    assert consumers(grouped("falcon"), f"{layer}.input_layernorm.weight") == [
        f"{layer}.self_attention.query_key_value.weight",
        f"{layer}.mlp.dense_h_to_4h.weight",
    ]


def test_scales_behind_a_relu_are_positive(grouped: Grouped) -> None:
    for arch in ("opt", "t5"):
        positive = [name for name, g in grouped(arch).groups.items() if g.positive]
        assert positive
        assert all(re.search(r"fc1|\.wi\.", name) for name in positive)


# What is refused


@pytest.mark.parametrize(
    ("arch", "linear", "side", "reason"),
    [
        ("llama_tied", "model.embed_tokens.weight", "inputs", "it is normalised: add at add"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k.weight", "inputs", "leaves the program"),
        ("bert", "encoder.layer.0.intermediate.dense.weight", "outputs", "gelu at gelu"),
        ("bert", "encoder.layer.0.intermediate.dense.weight", "inputs", "layer_norm at layer_norm_2"),
        ("bert", "encoder.layer.1.attention.self.query.weight", "inputs", "layer_norm at layer_norm_3"),
        ("llama", "model.layers.0.mlp.gate_proj.weight", "outputs", "silu at silu"),
        ("llama", "lm_head.weight", "outputs", "it leaves the program"),
        ("qwen3", "model.layers.0.self_attn.q_proj.weight", "outputs", "it is normalised: add"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "outputs", "softmax at softmax"),
    ],
)  # fmt: skip
def test_refusals_name_the_operator(
    arch: str, linear: str, side: str, reason: str, grouped: Grouped
) -> None:
    reasons = {(r.linear, r.side): r.reason for r in grouped(arch).refusals}
    assert reason in reasons[linear, side]


def test_a_side_is_refused_or_in_a_group(arch: str, grouped: Grouped, captured: Captured) -> None:
    found = grouped(arch)
    refused = {r.linear for r in found.refusals if r.side == "inputs"}
    scaled = {c.linear for g in found.groups.values() for c in g.consumers}
    assert refused | scaled == {linear.name for linear in find_linears(captured(arch))}
    for linear in refused & scaled:
        reasons = [r.reason for r in found.refusals if (r.linear, r.side) == (linear, "inputs")]
        assert all(re.match(r"\d+ of \d+: ", reason) for reason in reasons)


# The fact


def test_groups_do_not_depend_on_the_run(captured: Captured, grouped: Grouped) -> None:
    again = find_scale_groups(captured("mixtral"))
    assert list(again.groups) == list(grouped("mixtral").groups)
    assert same_facts({ScaleGroups: again}, {ScaleGroups: grouped("mixtral")})


def test_groups_do_not_depend_on_names(grouped: Grouped) -> None:
    model = ZOO["opt"].model()
    renamed = rename_modules(model)
    found = find_scale_groups(capture(model, ZOO["opt"].inputs()))
    originals = grouped("opt").groups.values()
    for group, original in zip(found.groups.values(), originals, strict=True):
        assert group.parameters == tuple(renamed[name] for name in original.parameters)


def test_a_group_that_does_not_fit_is_reported(grouped: Grouped, captured: Captured) -> None:
    found, program = grouped("llama"), captured("llama")
    name, group = next(iter(found.groups.items()))

    def complaint(**changes: object) -> str | None:
        part = dataclasses.replace(group.members[-1], **changes)  # type: ignore[arg-type]
        changed = dataclasses.replace(group, members=(*group.members[:-1], part))
        return ScaleGroups({name: changed}).check(program)

    assert complaint() is None
    assert complaint(parameter="nowhere") == f"group {name} scales nowhere, which does not exist"
    for wrong in ({"axis": 0, "channels": torch.zeros(64)}, {"axis": None}, {"stacked": True}):
        reason = complaint(**wrong)
        assert reason is not None, wrong
        assert "v_proj.weight of shape (48, 64)" in reason


def test_a_part_of_the_groups(grouped: Grouped, captured: Captured) -> None:
    found = grouped("llama")
    linears = [linear.name for linear in find_linears(captured("llama"))]
    first, rest = linears[:7], linears[7:]
    parts = [found.restrict(first), found.restrict(rest)]
    assert [len(part.groups) for part in parts] == [5, 6]
    assert {r.linear for r in parts[0].refusals} <= set(first)
    # A group needs all its linears.
    without_values = found.restrict([name for name in first if "v_proj" not in name])
    assert len(without_values.groups) == 3
    merged = parts[1].merge(parts[0]).merge(parts[0])
    assert merged.groups.keys() == found.groups.keys()
    assert set(merged.refusals) == set(found.refusals)
    assert len(merged.refusals) == len(found.refusals)


class Twins(nn.Module):
    """Two groups between the same parameters: one behind a ReLU, one not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        mixed = torch.cat([hidden[..., :6].relu(), hidden[..., 6:]], -1)
        down: torch.Tensor = self.down(mixed)
        return down


def test_one_channel_behind_a_relu_makes_its_group_positive() -> None:
    program = capture(Twins().eval(), {"x": torch.randn(2, 3, 8)})
    (group,) = find_scale_groups(program).groups.values()
    assert group.positive
    assert group.size == 12
