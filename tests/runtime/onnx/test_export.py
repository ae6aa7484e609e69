"""Every architecture of the zoo through the whole export, and what an export refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from conftest import Exported, logits_of, parameters
from torch import nn
from zoo import ZOO

from zeroskip.ir.errors import ArtifactError, LoweringError, ParityError
from zeroskip.ir.weights import Weights
from zeroskip.runtime.onnx.export import export_onnx
from zeroskip.runtime.onnx.parity import LIMIT, PARITY_FILE
from zeroskip.runtime.onnx.session import OnnxModel

GENERATED = ("llama", "qwen3", "gemma3", "gpt2")


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_exported_and_agrees(
    name: str, exported: Callable[[str], Exported]
) -> None:
    result = exported(name)
    artifact = result.artifact
    assert artifact.form == ("cache" if ZOO[name].kind == "causal-lm" else "plain")
    assert artifact.parity is not None
    assert artifact.parity.worst <= LIMIT
    # A size that the graph has not got would be dropped from the cases.
    assert len(artifact.parity.cases) >= (5 if artifact.form == "cache" else 3)
    graph = onnx.load(artifact.path / "model.onnx").graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    expected = {key: tuple(p.shape) for key, p in result.model.named_parameters()}
    read = {key: shape for key, shape in stored.items() if key in expected}
    assert read == {key: expected[key] for key in read}
    if artifact.form == "cache":
        assert read == expected
        assert artifact.outputs[:3] == ("logits", "present.0.key", "present.0.value")
        past = {v.name: v for v in graph.input}["past_key_values.0.key"].type.tensor_type.shape.dim
        assert [past[0].dim_param, past[2].dim_param] == ["batch_size", "past_sequence_length"]
    if name in GENERATED:
        _check_generation(result)


def _check_generation(result: Exported) -> None:
    """Greedy tokens of eager, of our own session and of onnxruntime-genai are the same."""
    prompt = ZOO["llama"].inputs(2, 7)["input_ids"]
    mask = torch.ones_like(prompt)
    # Every token counts: neither side may stop at an end-of-sequence token.
    expected = result.model.generate(  # type: ignore[operator]
        prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(OnnxModel(result.artifact.path).generate(prompt, 20), expected)
    genai = pytest.importorskip("onnxruntime_genai")
    config = json.loads((result.artifact.path / "genai_config.json").read_text())
    model_config = genai.Config(str(result.artifact.path))
    model_config.overlay(json.dumps({"model": {"eos_token_id": config["model"]["vocab_size"] - 1}}))
    parameters = genai.GeneratorParams(genai.Model(model_config))
    del parameters
    model = genai.Model(str(result.artifact.path))
    options = genai.GeneratorParams(model)
    options.set_search_options(batch_size=2, max_length=27, min_length=27)
    generator = genai.Generator(model, options)
    generator.append_tokens(prompt.numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [torch.as_tensor(generator.get_sequence(row)) for row in range(2)]
    assert torch.equal(torch.stack(rows).long(), expected)
