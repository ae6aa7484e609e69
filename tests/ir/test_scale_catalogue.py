"""Groups of architectures that the zoo has not got: what is unusual in each, found and proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.scaling import fold, leaving_out
from tests.zoo import VOCABULARY, ZOO, Config, randomize
from zeroskip.ir.capture import capture
from zeroskip.ir.scale_groups import find_scale_groups
from zeroskip.passes.base import measure_drift

SIZES: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Config = {**SIZES, "num_key_value_heads": 2}
CHOICE: Config = {"num_experts_per_tok": 2}
LATENT: Config = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}

# For each: the model; by group, what it scales (the last part of the linears' names) and its size;
# which sides of linears are refused, and why.
Case = tuple[Callable[[], nn.Module], dict[str, tuple[str, int]], dict[str, str]]
CASES: dict[str, Case] = {
    # One norm in front of attention and MLP; half of each head turns, in neighbouring pairs.
    "gptj": (
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=1,
                n_head=4,
                n_inner=48,
                rotary_dim=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        {
            "ln_1 -> q_proj": ("q_proj k_proj v_proj fc_in", 32),
            "k_proj -> q_proj": ("", 4 * (2 + 4)),
            "v_proj -> out_proj": ("out_proj", 32),
            "ln_f -> lm_head": ("lm_head", 32),
        },
        {"mlp.fc_in outputs": "pow at pow"},
    ),
    # The same, and half of each head turns, in halves.
    "phi": (
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES, partial_rotary_factor=0.5)),
        {
            "input_layernorm -> q_proj": ("q_proj k_proj v_proj fc1", 32),
            "k_proj -> q_proj": ("", 4 * (2 + 4)),
            "v_proj -> dense": ("dense", 32),
            "final_layernorm -> lm_head": ("lm_head", 32),
        },
        {"mlp.fc1 outputs": "pow at pow"},
    ),
    # The same with a gated MLP, keys shared by heads, and a head that is the embedding.
    "cohere": (
        lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
        {
            "input_layernorm -> q_proj": ("q_proj k_proj v_proj gate_proj up_proj", 32),
            "k_proj -> q_proj": ("", 2 * 4),
            "v_proj -> o_proj": ("o_proj", 16),
            "up_proj -> down_proj": ("down_proj", 48),
        },
        {"embed_tokens inputs": "it is normalised: add"},
    ),
    # Experts whose gate is clamped and gets 1 added; attention with sinks.
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**GROUPED, **CHOICE, head_dim=8, num_local_experts=4)
        ),
        {
            "input_layernorm -> q_proj": ("q_proj k_proj v_proj", 32),
            "k_proj -> q_proj": ("", 2 * 4),
            "v_proj -> o_proj": ("o_proj", 16),
            "post_attention_layernorm -> router": (
                "router gate_up_proj[0] gate_up_proj[1] gate_up_proj[2] gate_up_proj[3]",
                32,
            ),
            "norm -> lm_head": ("lm_head", 32),
        },
        {"mlp.experts.gate_up_proj[1] outputs": "clamp at clamp: has a bound"},
    ),
    # Queries, keys and values through a narrow layer with a norm; experts, one of them for all tokens.
    "deepseek_v3": (
        lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **LATENT, **CHOICE)),
        {
            "input_layernorm -> q_a_proj": ("q_a_proj kv_a_proj_with_mqa", 32),
            "q_a_layernorm -> q_b_proj": ("q_b_proj", 24),
            "kv_a_layernorm -> kv_b_proj": ("kv_b_proj", 20),
            # Keys: what turns is one head for all queries, in pairs; the rest is each head's own.
            "kv_a_proj_with_mqa -> q_b_proj": ("", 2),
            "kv_b_proj -> q_b_proj": ("", 4 * 8),
            "kv_b_proj -> o_proj": ("o_proj", 4 * 12),
            "post_attention_layernorm -> gate": (
                (
                    "gate gate_up_proj[0] gate_up_proj[1] gate_up_proj[2] gate_up_proj[3] gate_proj "
                    "up_proj"
                ),
                32,
            ),
            "gate_up_proj -> down_proj": (
                "down_proj[0] down_proj[1] down_proj[2] down_proj[3]",
                4 * 16,
            ),
            "up_proj -> down_proj": ("down_proj", 16),
            "norm -> lm_head": ("lm_head", 32),
        },
        {"self_attn.kv_a_proj_with_mqa outputs": "20 of 24: it is normalised: add at add"},
    ),
    # Queries, keys and values interleaved by head; the product of logits adds slopes of distances.
    "bloom": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
        ),
        {
            "input_layernorm -> query_key_value": ("query_key_value", 32),
            "query_key_value -> query_key_value": ("", 32),
            "query_key_value -> dense": ("dense", 32),
            "post_attention_layernorm -> dense_h_to_4h": ("dense_h_to_4h", 32),
        },
        {"mlp.dense_h_to_4h outputs": "a constant is added: add"},
    ),
    # A squared ReLU.
    "arcee": (
        lambda: hf.ArceeForCausalLM(hf.ArceeConfig(**GROUPED)),
        {
            "input_layernorm -> q_proj": ("q_proj k_proj v_proj", 32),
            "k_proj -> q_proj": ("", 2 * 4),
            "v_proj -> o_proj": ("o_proj", 16),
            "post_attention_layernorm -> up_proj": ("up_proj", 32),
            "up_proj -> down_proj": ("down_proj", 48),
            "norm -> lm_head": ("lm_head", 32),
        },
        {},
    ),
    # What leaves attention and MLP is multiplied by a gain on its way into the residual stream.
    "dinov2": (
        lambda: hf.Dinov2Model(
            hf.Dinov2Config(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                mlp_ratio=2,
                image_size=32,
                patch_size=8,
            )
        ),
        {
            "norm1 -> q_proj": ("q_proj k_proj v_proj", 32),
            "k_proj -> q_proj": ("", 32),
            "v_proj -> o_proj": ("o_proj", 32),
            "lambda1 -> o_proj": ("", 32),
            "norm2 -> fc1": ("fc1", 32),
            "lambda1 -> fc2": ("", 32),
        },
        {"mlp.fc1 outputs": "gelu at gelu"},
    ),
    # The norm feeds the router, every expert, the shared expert and the gate of that.
    "qwen2_moe": (
        lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **GROUPED,
                **CHOICE,
                num_experts=4,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=24,
                decoder_sparse_step=1,
            )
        ),
        {
            "input_layernorm -> q_proj": ("q_proj k_proj v_proj", 32),
            "k_proj -> q_proj": ("", 2 * 4),
            "v_proj -> o_proj": ("o_proj", 16),
            "post_attention_layernorm -> gate_proj": (
                (
                    "gate_proj up_proj gate gate_up_proj[0] gate_up_proj[1] gate_up_proj[2] "
                    "gate_up_proj[3] shared_expert_gate"
                ),
                32,
            ),
            "up_proj -> down_proj": ("down_proj", 24),
            "gate_up_proj -> down_proj": (
                "down_proj[0] down_proj[1] down_proj[2] down_proj[3]",
                4 * 16,
            ),
            "norm -> lm_head": ("lm_head", 32),
        },
        {"mlp.shared_expert_gate outputs": "sigmoid at sigmoid"},
    ),
}

# Keys that are all moved alike are the same to a softmax, where positions do not turn them; the
# bias of fused projections has queries and keys in it.
INERT = {"bloom": "query_key_value.bias", "dinov2": "k_proj.bias"}


def last(name: str) -> str:
    return name.replace(".weight", "").rpartition(".")[2]


@pytest.mark.parametrize("name", CASES)
def test_groups_of_an_architecture(name: str) -> None:
    build, expected, refused = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = build().eval()
        randomize(model)
    inputs = ZOO["vit" if name == "dinov2" else "llama"].inputs
    program = capture(model, inputs())
    found = find_scale_groups(program)
    groups = {
        " -> ".join(last(end) for end in group.name.split(" -> ")): (
            " ".join(last(consumer.linear) for consumer in group.consumers),
            group.size,
        )
        for group in found.groups.values()
    }
    assert groups == expected
    reasons = {f"{r.linear.replace('.weight', '')} {r.side}": r.reason for r in found.refusals}
    for where, why in refused.items():
        (reason,) = [text for side, text in reasons.items() if side.endswith(where)]
        assert why in reason
    # At other sizes than it was captured at, with padding.
    others = inputs(3, 17, padded=True)
    assert 0 < measure_drift(program, fold(program, found.groups.values()), others) < 5e-6
    exact = fold(program, found.groups.values(), powers_of_two=True)
    assert measure_drift(program, exact, others) == 0
    for group in found.groups.values():
        for parameter, rest in leaving_out(group):
            drift = measure_drift(program, fold(program, [rest]), others)
            assert drift > 1e-4 or parameter.endswith(INERT.get(name, "none")), parameter
