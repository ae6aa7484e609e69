"""The models of `cpu_model.py`, with the inputs that each is timed at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from models.decoder import DecoderShape, decoder_in_torch, decoder_model
from models.encoder import EncoderShape, encoder_in_torch, encoder_model
from models.weights import fold_transposes, torch_weights

Feeds = Mapping[str, np.ndarray]
TorchRun = Callable[[Feeds], object]
TINY_ENCODER = EncoderShape(layers=1, width=128, heads=2, hidden=256)
TINY_DECODER = DecoderShape(layers=1, width=128, heads=2, hidden=320)


@dataclass(frozen=True)
class Inputs:
    """One way to call a model.

    Args:
        feeds: Inputs by name.
        tokens: How many tokens a call computes.
    """

    feeds: Feeds
    tokens: int


@dataclass(frozen=True)
class ModelCase:
    """A dense model.

    Args:
        name: As it is reported.
        model: Made when it is asked for, since it is large.
        inputs: By name; the first one is what memory is measured with.
        in_torch: Makes the same model in torch from the dense one.
        fixed: The model again with the fixed shapes of an input, for DeepSparse; None: it has no
            such form.
        min_weights: Smaller linears stay dense.
    """

    name: str
    model: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, Inputs]
    in_torch: Callable[[onnx.ModelProto], TorchRun]
    fixed: Callable[[Inputs], onnx.ModelProto] | None = None
    min_weights: int = 0


def encoder_case(*, tiny: bool = False) -> ModelCase:
    """Four layers of the shape of BERT-base."""
    shape = TINY_ENCODER if tiny else EncoderShape()
    random = np.random.default_rng(0)

    def inputs(batch: int, sequence: int) -> Inputs:
        x = random.standard_normal((batch, sequence, shape.width), dtype=np.float32)
        return Inputs({"x": x}, batch * sequence)

    def in_torch(model: onnx.ModelProto) -> TorchRun:
        weights = torch_weights(model)
        return lambda feeds: encoder_in_torch(weights, shape, torch.from_numpy(feeds["x"]))

    def fixed(inputs: Inputs) -> onnx.ModelProto:
        batch, sequence, _width = inputs.feeds["x"].shape
        return encoder_model(shape, batch=batch, sequence=sequence, opset=13)

    return ModelCase(
        "tiny-encoder" if tiny else "encoder",
        lambda: encoder_model(shape, batch="batch", sequence="sequence"),
        {f"{batch}x{sequence}": inputs(batch, sequence) for batch, sequence in ENCODER_INPUTS},
        in_torch,
        fixed,
    )


ENCODER_INPUTS = ((1, 128), (4, 128), (1, 16))


def decoder_case(*, tiny: bool = False, past: int = 128) -> ModelCase:
    """Six blocks like LLaMA's, with a cache."""
    shape = TINY_DECODER if tiny else DecoderShape()
    random = np.random.default_rng(0)
    cache = random.standard_normal((1, shape.heads, past, shape.width // shape.heads), np.float32)

    def inputs(tokens: int) -> Inputs:
        x = random.standard_normal((1, tokens, shape.width), dtype=np.float32)
        return Inputs({"x": x, "past_key": cache, "past_value": cache}, tokens)

    def in_torch(model: onnx.ModelProto) -> TorchRun:
        weights = torch_weights(model)

        def run(feeds: Feeds) -> object:
            x, key, value = (
                torch.from_numpy(feeds[name]) for name in ("x", "past_key", "past_value")
            )
            return decoder_in_torch(weights, shape, x, key, value)

        return run

    named = {"decode": 1, "4 tokens": 4, "prefill 128": 128}
    return ModelCase(
        "tiny-decoder" if tiny else "decoder",
        lambda: decoder_model(shape),
        {name: inputs(tokens) for name, tokens in named.items()},
        in_torch,
    )


def smollm2_case(checkpoint: Path, exported: Path, *, past: int = 128) -> ModelCase:
    """SmolLM2-135M as zeroskip exports it, with its cache.

    Args:
        checkpoint: The Hugging Face directory.
        exported: The dense ONNX folder; written when it is not there, which takes minutes.
        past: Tokens in the cache when one token is decoded.
    """
    from transformers import AutoConfig

    if not (exported / "model.onnx").is_file():
        # Not here: this process has one thread pool for all sessions, the export's have their own.
        command = [sys.executable, "-m", "zeroskip", "export", str(checkpoint)]
        subprocess.run([*command, "--out", str(exported)], stdout=sys.stderr, check=True)
    config = AutoConfig.from_pretrained(checkpoint)
    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False).graph
    names = {value.name for value in graph.input}
    cache = (1, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    random = np.random.default_rng(0)

    def inputs(tokens: int, past: int) -> Inputs:
        batch, heads, width = cache
        feeds = {
            "input_ids": random.integers(1, config.vocab_size, (batch, tokens)),
            "attention_mask": np.ones((batch, past + tokens), np.int64),
        }
        if "position_ids" in names:
            feeds["position_ids"] = np.arange(past, past + tokens)[None]
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                held = random.standard_normal((batch, heads, past, width), dtype=np.float32)
                feeds[f"past_key_values.{layer}.{part}"] = held
        return Inputs(feeds, tokens)

    def in_torch(_model: onnx.ModelProto) -> TorchRun:
        return _smollm2_in_torch(checkpoint, config.num_hidden_layers)

    return ModelCase(
        "smollm2-135m",
        lambda: fold_transposes(onnx.load(str(exported / "model.onnx"))),
        {"decode": inputs(1, past), "prefill 128": inputs(128, 0), "prefill 512": inputs(512, 0)},
        in_torch,
    )


def _smollm2_in_torch(checkpoint: Path, layers: int) -> TorchRun:
    from transformers import DynamicCache

    from zeroskip.models import load_model

    model, _tokenizer = load_model(checkpoint)

    def run(feeds: Feeds) -> object:
        cache = DynamicCache(config=model.config)
        for layer in range(layers):
            key, value = (
                torch.from_numpy(feeds[f"past_key_values.{layer}.{part}"])
                for part in ("key", "value")
            )
            cache.update(key, value, layer)
        return model(
            input_ids=torch.from_numpy(feeds["input_ids"]),
            attention_mask=torch.from_numpy(feeds["attention_mask"]),
            past_key_values=cache,
        )

    return run
