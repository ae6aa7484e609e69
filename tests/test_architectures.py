"""Every architecture of the zoo from the live model to a file that ONNX Runtime runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai as genai
import pytest
import torch
from torch import nn

from tests.zoo import VOCABULARY, ZOO, randomize
from zeroskip import compile_sparse
from zeroskip.ir.facts import Lowered, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.passes import ApplyMasks, ExportOnnx, LowerMasked, Observe, Pass, PruneWanda
from zeroskip.passes.base import TOLERANCES, relative_drift
from zeroskip.runtime.onnx.parity import PARITY_FILE
from zeroskip.runtime.onnx.session import OnnxModel

GENERATED = ("llama", "qwen3", "gemma3", "gpt2")
LOWERED = ("llama", "gpt2", "mixtral", "vit", "mlp")
# Their layers are all alike, and an export takes seconds for each: one is enough. The others show
# that the second layer and its cache are named and joined as the first.
ALIKE = (
    *("llama_tied", "opt", "qwen2", "mistral", "phi3", "gpt_neox", "falcon", "mixtral"),
    *("qwen3_moe", "bert", "roberta", "distilbert", "vit"),
)
DECODERS = [name for name, entry in ZOO.items() if entry.kind == "causal-lm"]


def model_of(name: str) -> nn.Module:
    model = ZOO[name].model()
    if name not in ALIKE:
        return model
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shallow = type(model)(config)
        randomize(shallow)
    assert sum(1 for _ in shallow.parameters()) < sum(1 for _ in model.parameters())
    return shallow.eval()


@pytest.mark.parametrize("name", ZOO)
def test_compiles(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model = model_of(name)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [entry.inputs(2, 12), entry.inputs(3, 9, padded=True)]
    pattern = "50%" if entry.kind == "plain" else "2:4"
    passes: list[Pass] = [Observe(), PruneWanda(pattern), ApplyMasks()]
    passes += [LowerMasked()] if name in LOWERED else []
    compiled = compile_sparse(
        model,
        [*passes, ExportOnnx(tmp_path / "onnx")],
        example_inputs=entry.inputs(),
        calibration=batches,
    )
    program = compiled.program
    masks = program.fact(SparseWeights).masks
    assert masks
    # Of an odd width the larger half is kept.
    shapes = [mask.shape for mask in masks.values()]
    kept = sum(rows * (width - width // 2) for rows, width in shapes)
    assert compiled.report.density == kept / sum(rows * width for rows, width in shapes)
    for linear in find_linears(program):
        weight = linear.weight(program)
        assert torch.equal(weight, linear.view(model.get_parameter(linear.parameter)))
        if linear.name in masks:
            keep = masks[linear.name].keep()
            assert torch.equal(weight, linear.view(dense[linear.parameter]) * keep), linear.name
        else:
            assert torch.equal(weight, linear.view(dense[linear.parameter])), linear.name
    if name in LOWERED:
        assert program.fact(Lowered).operators
    # What was compiled computes what the user's own model computes, at sizes that were not traced.
    for batch, sequence in entry.sizes:
        inputs = entry.inputs(batch, sequence, padded=batch > 1)
        with torch.no_grad():
            expected = model(**inputs)
        first = expected if isinstance(expected, torch.Tensor) else expected[program.outputs[0]]
        found = compiled(**inputs)[program.outputs[0]]
        assert relative_drift(first, found) <= TOLERANCES[torch.float32]
    check_file(name, model, tmp_path / "onnx")


def check_file(name: str, model: nn.Module, folder: Path) -> None:
    """The file was compared at several sizes, and holds each weight under its own name."""
    record = json.loads((folder / PARITY_FILE).read_text())
    causal = name in DECODERS
    assert record["worst"] <= 1e-4
    # A size that the graph has not got would be dropped from the cases.
    assert len(record["cases"]) >= (5 if causal else 3)
    graph = onnx.load(folder / "model.onnx").graph
    # Masks are zeros in the file: a client needs no operator of ours.
    assert "zeroskip" not in {node.domain for node in graph.node}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    parameters = dict(model.named_parameters())
    shared = parameters.keys() & stored.keys()
    assert shared == parameters.keys() if causal else shared
    for key in shared:
        value = torch.from_numpy(onnx.numpy_helper.to_array(stored[key]).copy())
        assert torch.equal(value, parameters[key].detach()), key
    if causal:
        outputs = [value.name for value in graph.output]
        assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
        past = {v.name: v for v in graph.input}["past_key_values.0.key"].type.tensor_type.shape.dim
        assert [past[0].dim_param, past[2].dim_param] == ["batch_size", "past_sequence_length"]
    if name in GENERATED:
        check_generation(model, folder)


def check_generation(model: nn.Module, folder: Path) -> None:
    """Greedy tokens of eager, of our own session and of onnxruntime-genai are the same."""
    prompt = ZOO["llama"].inputs(2, 7)["input_ids"]
    # Every token counts, so no side may stop at an end-of-sequence token.
    expected = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(OnnxModel(folder, threads=1).generate(prompt, 20), expected)
    unused = min(set(range(VOCABULARY)) - set(expected.flatten().tolist()))
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"eos_token_id": unused}}))
    client = genai.Model(config)
    options = genai.GeneratorParams(client)
    options.set_search_options(batch_size=2, max_length=27)
    generator = genai.Generator(client, options)
    generator.append_tokens(prompt.numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [torch.as_tensor(generator.get_sequence(row)) for row in range(2)]
    assert torch.equal(torch.stack(rows).long(), expected)
