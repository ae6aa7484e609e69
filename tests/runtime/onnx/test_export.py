"""What an export writes, notices and refuses; tests/test_architectures.py exports every model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx_models import logits_of, parameters, without_data
from torch import nn
from zoo import ZOO

from zeroskip.ir.errors import ArtifactError, LoweringError, ParityError
from zeroskip.ir.weights import Weights
from zeroskip.runtime.onnx.export import export_onnx
from zeroskip.runtime.onnx.parity import LIMIT, PARITY_FILE


@pytest.mark.usefixtures("translated_once")
def test_export_writes_what_clients_read(small_llama: nn.Module, tmp_path: Path) -> None:
    tokenizer = tmp_path / "checkpoint"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    artifact = export_onnx(
        tmp_path / "out",
        weights=parameters(small_llama),
        reference=logits_of(small_llama),
        model=small_llama,
        tokenizer_source=tokenizer,
    )
    assert {file.name for file in artifact.path.iterdir()} == {
        "model.onnx",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        PARITY_FILE,
    }
    config = json.loads((artifact.path / "genai_config.json").read_text())["model"]
    assert config["eos_token_id"] == [2, 3]
    assert config["decoder"]["num_key_value_heads"] == 2
    record = json.loads((artifact.path / PARITY_FILE).read_text())
    assert artifact.parity is not None
    assert record["worst"] == artifact.parity.worst
    assert b"site-packages" not in (artifact.path / "model.onnx").read_bytes()


@pytest.mark.usefixtures("translated_once")
def test_a_wrong_weight_is_noticed_and_nothing_is_left(
    small_llama: nn.Module, tmp_path: Path
) -> None:
    weights = parameters(small_llama)
    name = "model.layers.0.mlp.down_proj.weight"
    corrupted = weights[name].clone()
    corrupted[0, 0] += 1.0
    with pytest.raises(ParityError, match=r"'logits' differs by .* CacheCase") as caught:
        export_onnx(
            tmp_path / "out",
            weights=weights.replace({name: corrupted}),
            reference=logits_of(small_llama),
            model=small_llama,
        )
    assert caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_exported_as_float32(small_llama: nn.Module, tmp_path: Path) -> None:
    # The widened weights are exact, so float32 from the narrow weights is the reference.
    narrow = copy.deepcopy(small_llama).to(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    # Converting the module has rounded this buffer too, which loading in bfloat16 would not.
    for module in (narrow, wide):
        module.model.rotary_emb.inv_freq = small_llama.model.rotary_emb.inv_freq
    artifact = export_onnx(
        tmp_path / "out", weights=parameters(narrow), reference=logits_of(wide), model=narrow
    )
    graph = onnx.load(artifact.path / "model.onnx").graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert types["past_key_values.0.key"] == types["logits"] == onnx.TensorProto.FLOAT
    assert artifact.parity is not None
    assert artifact.parity.worst <= LIMIT


def test_sliding_window_holds_beyond_the_window(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        sliding_window=4,
    )
    model = MistralForCausalLM(config).eval()
    artifact = export_onnx(
        tmp_path / "out", weights=parameters(model), reference=logits_of(model), model=model
    )
    assert artifact.parity is not None
    assert artifact.parity.worst <= LIMIT


def test_cache_form_is_refused_without_a_causal_model(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="needs the model itself"):
        export_onnx(tmp_path / "a", weights=Weights({}), reference=None, form="cache")
    with pytest.raises(LoweringError, match="takes no input_ids"):
        export_onnx(
            tmp_path / "b",
            weights=Weights({}),
            reference=None,
            model=ZOO["mlp"].model(),
            form="cache",
        )
    assert list(tmp_path.iterdir()) == []


def test_plain_form_is_refused_without_a_graph(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="needs a captured graph"):
        export_onnx(tmp_path / "out", weights=Weights({}), reference=None, model=ZOO["mlp"].model())


def test_an_export_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(ArtifactError, match="already holds something"):
        export_onnx(tmp_path, weights=Weights({}), reference=None)


def test_an_edit_is_applied_before_translation(small_llama: nn.Module, tmp_path: Path) -> None:
    def break_it(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.silu.default
        ):
            node.target = torch.ops.aten.relu.default
        graph_module.recompile()
        return graph_module

    with pytest.raises(ParityError, match="'logits' differs"):
        export_onnx(
            tmp_path / "out",
            weights=parameters(small_llama),
            reference=logits_of(small_llama),
            model=small_llama,
            edit=break_it,
        )


def test_a_skeleton_is_exported_to_the_same_bytes(small_llama: nn.Module, tmp_path: Path) -> None:
    weights = parameters(small_llama)
    files = []
    for number, model in enumerate((small_llama, without_data(small_llama))):
        artifact = export_onnx(tmp_path / str(number), weights=weights, reference=None, model=model)
        assert artifact.parity is None
        files.append((artifact.path / "model.onnx").read_bytes())
    assert files[0] == files[1]
