"""The configuration that onnxruntime-genai reads."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig

from zeroskip.runtime.onnx.cache_geometry import CacheGeometry, LayerShape
from zeroskip.runtime.onnx.client_config import genai_config

EQUAL = LayerShape((2, 16), (2, 16))
INPUTS = ("input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value")


def geometry(*layers: LayerShape) -> CacheGeometry:
    return CacheGeometry(layers, torch.float32, takes_positions=False, vocabulary=64)


def test_only_inputs_of_the_file_are_announced() -> None:
    config = genai_config(geometry(EQUAL), INPUTS, LlamaConfig(), None)
    assert config is not None
    inputs = config["model"]["decoder"]["inputs"]
    assert "position_ids" not in inputs
    assert inputs["past_key_names"] == "past_key_values.%d.key"
    assert config["search"]["past_present_share_buffer"] is False


def test_the_generation_configuration_comes_first() -> None:
    model = LlamaConfig(eos_token_id=7, bos_token_id=5, pad_token_id=None)
    generation = GenerationConfig(eos_token_id=[8, 9])
    config = genai_config(geometry(EQUAL), INPUTS, model, generation)
    assert config is not None
    tokens = config["model"]
    assert (tokens["eos_token_id"], tokens["bos_token_id"], tokens["pad_token_id"]) == (
        [8, 9],
        5,
        8,
    )


def test_layers_of_different_shapes_have_no_client_configuration() -> None:
    assert (
        genai_config(geometry(EQUAL, LayerShape((1, 16), (1, 16))), INPUTS, LlamaConfig(), None)
        is None
    )
    assert genai_config(geometry(LayerShape((2, 16), (2, 8))), INPUTS, LlamaConfig(), None) is None
