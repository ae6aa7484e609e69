"""What clients read beside the model: `genai_config.json` for onnxruntime-genai.

The client switches on a model type. One generic type serves every exported graph, because the graph
itself already holds what differs between architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroskip.runtime.onnx.cache_geometry import CacheGeometry
from zeroskip.runtime.onnx.folder import MODEL_FILE

MODEL_TYPE = "decoder"
CONTEXT_NAMES = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length")
CONTEXT_LENGTH = 2048
"""For models with unlimited positions; only the default of the client's `max_length`."""


def genai_config(
    geometry: CacheGeometry,
    input_names: Sequence[str],
    config: Any,
    generation_config: Any | None,
) -> dict[str, Any] | None:
    """Returns the configuration for onnxruntime-genai, or None if it cannot describe the cache.

    It describes one head count and one width for all layers, keys and values alike.

    Args:
        geometry: The cache of the model.
        input_names: The inputs that the file really has.
        config: The model's configuration.
        generation_config: Takes precedence for the special tokens.
    """
    shapes = {shape for layer in geometry.layers for shape in (layer.key, layer.value)}
    if len(shapes) != 1:
        return None
    ((heads, width),) = shapes
    text = config.get_text_config(decoder=True)
    context = next(
        (n for name in CONTEXT_NAMES if (n := getattr(text, name, None))), CONTEXT_LENGTH
    )
    plain = [n for n in input_names if not n.startswith("past_key_values.")]
    decoder = {
        "filename": MODEL_FILE,
        "head_size": width,
        "hidden_size": getattr(text, "hidden_size", heads * width),
        "num_attention_heads": getattr(text, "num_attention_heads", heads),
        "num_hidden_layers": len(geometry.layers),
        "num_key_value_heads": heads,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            **{name: name for name in plain},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": MODEL_TYPE,
        "vocab_size": geometry.vocabulary,
        "context_length": context,
        **_special_tokens(text, generation_config),
        "decoder": decoder,
    }
    return {"model": model, "search": _greedy_search(context)}


def _special_tokens(config: Any, generation_config: Any | None) -> dict[str, Any]:
    tokens: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for source in (generation_config, config):
            value = getattr(source, name, None)
            if value is not None:
                tokens.setdefault(name, value)
    eos = tokens.get("eos_token_id")
    # The client pads finished rows; without a padding token it needs some other one.
    tokens.setdefault("pad_token_id", (eos[0] if isinstance(eos, list) else eos) or 0)
    return tokens


def _greedy_search(context: int) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "top_k": 1,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
        "early_stopping": True,
        # The graph returns a longer cache than it took; both cannot live in one buffer.
        "past_present_share_buffer": False,
    }
