"""Tiny models of random numbers, one per architecture that zeroskip claims to compile.

Every entry is small enough to capture in seconds and awkward enough to catch a shortcut: gains and
biases are not at their initial ones and zeros, attention has fewer key heads than query heads where
the architecture allows it, and no two widths agree by accident. The inputs of every prunable
linear of the transformer entries are a multiple of 8 wide, so 2:4 and 4:8 apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

Kind = Literal["causal-lm", "encoder", "vision", "seq2seq", "dual", "plain"]
Inputs = dict[str, Tensor]
Config = dict[str, Any]

VOCABULARY = 160
PAD = 0


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: Its key in `ZOO`.
        kind: What the model is for; decides which inputs it takes.
        build: Makes the model; random numbers come from torch's global generator.
        example: Makes its inputs from (batch, sequence, padded, generator).
        sizes: Two (batch, sequence) pairs other than the default of `inputs` that are also legal.
            Models with inputs of fixed size ignore the sequence.
    """

    name: str
    kind: Kind
    build: Callable[[], nn.Module]
    example: Callable[[int, int, bool, torch.Generator], Inputs]
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((1, 5), (3, 17))

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns the model in eval mode; the same numbers for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            randomize(model)
        return model.to(dtype).eval()

    def inputs(self, batch: int = 2, sequence: int = 9, padded: bool = False) -> Inputs:
        """Returns the keyword arguments of one call, float32 where they are not indices.

        Args:
            batch: Rows.
            sequence: Tokens per row.
            padded: Whether the first row starts with padding, where the model takes a mask.
        """
        generator = torch.Generator().manual_seed(batch * 1000 + sequence)
        return self.example(batch, sequence, padded, generator)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draws every weight so that activations stay near 1, and adds noise to gains and biases."""
    seen: set[Tensor] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen or parameter.ndim == 0:
                continue
            seen.add(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, _fan_in(module, parameter) ** -0.5)


def _fan_in(module: nn.Module, parameter: Tensor) -> int:
    if isinstance(module, Conv1D):
        return parameter.shape[0]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return parameter.shape[1:].numel()
    return parameter.shape[-1]


def _tokens(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    # The lowest ids are special tokens in these configurations.
    tokens = torch.randint(3, VOCABULARY - 1, (batch, sequence), generator=generator)
    mask = torch.ones(batch, sequence, dtype=torch.long)
    if padded:
        left = max(1, sequence // 3)
        tokens[0, :left] = PAD
        mask[0, :left] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _pair(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    target = torch.randint(3, VOCABULARY - 1, (batch, max(2, sequence - 2)), generator=generator)
    return {**_tokens(batch, sequence, padded, generator), "decoder_input_ids": target}


def _image(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def _text_and_image(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    return {
        **_tokens(batch, sequence, padded, generator),
        **_image(batch, sequence, padded, generator),
    }


def _spectrogram(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    return {"input_features": torch.randn(batch, 16, 100, generator=generator)}


def _features(batch: int, sequence: int, padded: bool, generator: torch.Generator) -> Inputs:
    return {"features": torch.randn(batch, sequence, 13, generator=generator)}


class Mlp(nn.Module):
    """Odd widths, a residual, a layer without bias and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(13, 27)
        self.mix = nn.Linear(27, 13, bias=False)
        self.norm = nn.LayerNorm(13)
        self.head = nn.Linear(13, 5)

    def forward(self, features: Tensor) -> Tensor:
        hidden = features + self.mix(torch.relu(self.up(features)))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class ConvNet(nn.Module):
    """Convolutions, plain, strided and grouped, in front of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 24, 1, bias=False)
        self.hidden = nn.Linear(24, 40)
        self.head = nn.Linear(40, 7)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(pixel_values))
        hidden = torch.relu(self.pointwise(self.depthwise(hidden)))
        logits: Tensor = self.head(torch.relu(self.hidden(hidden.mean((2, 3)))))
        return logits


BLOCKS: Config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DEPTH: Config = {**BLOCKS, "intermediate_size": 112}
TEXT: Config = {**DEPTH, "vocab_size": VOCABULARY}
SPECIAL: Config = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: Config = {**TEXT, **SPECIAL, "num_key_value_heads": 2}
# Query projections of 96 x 64, key and value projections of 48 x 64.
WIDE: Config = {**GROUPED, "head_dim": 24}
TRANSLATION: Config = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": 1}
LABELS: Config = {"num_labels": 10}
VISION: Config = {**DEPTH, "image_size": 32, "patch_size": 8}


def _entry(
    name: str, kind: Kind, model: Callable[..., nn.Module], config: Callable[[], object]
) -> Entry:
    example = {
        "causal-lm": _tokens,
        "encoder": _tokens,
        "vision": _image,
        "seq2seq": _pair,
        "dual": _text_and_image,
    }[kind]
    return Entry(name, kind, lambda: model(config()), example)


_ENTRIES = [
    _entry("llama", "causal-lm", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**WIDE)),
    _entry(
        "llama_tied",
        "causal-lm",
        hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    ),
    _entry(
        "opt",
        "causal-lm",
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **BLOCKS,
            **SPECIAL,
            word_embed_proj_dim=64,
            ffn_dim=112,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
        ),
    ),
    _entry("qwen2", "causal-lm", hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED)),
    _entry("qwen3", "causal-lm", hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**WIDE)),
    _entry(
        "mistral",
        "causal-lm",
        hf.MistralForCausalLM,
        lambda: hf.MistralConfig(**WIDE, sliding_window=4096),
    ),
    _entry("gemma2", "causal-lm", hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**WIDE)),
    _entry("gemma3", "causal-lm", hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(**WIDE)),
    _entry("phi3", "causal-lm", hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**GROUPED)),
    _entry(
        "gpt2",
        "causal-lm",
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            **SPECIAL,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=112,
            n_positions=128,
            vocab_size=VOCABULARY,
        ),
    ),
    _entry(
        "gpt_neox",
        "causal-lm",
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(**TEXT, **SPECIAL),
    ),
    _entry(
        "falcon",
        "causal-lm",
        hf.FalconForCausalLM,
        lambda: hf.FalconConfig(
            **BLOCKS, **SPECIAL, vocab_size=VOCABULARY, ffn_hidden_size=112, multi_query=True
        ),
    ),
    _entry(
        "mixtral",
        "causal-lm",
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    ),
    _entry(
        "qwen3_moe",
        "causal-lm",
        hf.Qwen3MoeForCausalLM,
        lambda: hf.Qwen3MoeConfig(
            **WIDE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
    _entry(
        "bert",
        "encoder",
        hf.BertModel,
        lambda: hf.BertConfig(**TEXT, max_position_embeddings=128),
    ),
    _entry(
        "roberta",
        "encoder",
        hf.RobertaModel,
        # Positions start behind the padding index.
        lambda: hf.RobertaConfig(**TEXT, max_position_embeddings=128, pad_token_id=PAD),
    ),
    _entry(
        "distilbert",
        "encoder",
        hf.DistilBertModel,
        lambda: hf.DistilBertConfig(
            dim=64,
            hidden_dim=112,
            n_layers=2,
            n_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
        ),
    ),
    _entry(
        "vit",
        "vision",
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(**VISION, **LABELS),
    ),
    _entry(
        "t5",
        "seq2seq",
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            d_model=64,
            d_kv=24,
            d_ff=112,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            **TRANSLATION,
        ),
    ),
    Entry(
        "whisper_encoder",
        "encoder",
        lambda: WhisperEncoder(
            hf.WhisperConfig(
                **SPECIAL,
                d_model=64,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=112,
                decoder_ffn_dim=112,
                vocab_size=VOCABULARY,
                num_mel_bins=16,
                max_source_positions=50,
                decoder_start_token_id=1,
            )
        ),
        _spectrogram,
    ),
    _entry(
        "clip",
        "dual",
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config={**TEXT, **SPECIAL, "max_position_embeddings": 32},
            vision_config={**VISION, "hidden_size": 48},
            projection_dim=40,
        ),
    ),
    Entry("mlp", "plain", Mlp, _features),
    Entry("convnet", "plain", ConvNet, _image),
]

ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
