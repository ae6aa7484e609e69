from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from zeroskip.ir.errors import ArtifactError
from zeroskip.models import load_model, load_tokenizer
from zeroskip.progress import without_loading_bars

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that GGUF keeps query and key projections in."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Writes a model in float32, with a tokenizer of single bytes, as llama.cpp would."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = sorted(ByteLevel.alphabet())
    letters[-1] = letters[0] + letters[1]  # a vocabulary needs a merge to be one of this kind
    writer.add_token_list(letters)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(letters))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        if "k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        name = name.replace("model.layers.", "blk.").replace("model.norm", "output_norm")
        name = name.replace("model.embed_tokens", "token_embd").replace("lm_head", "output")
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_directory_comes_back(checkpoint: Path, model: LlamaForCausalLM) -> None:
    loaded, tokenizer = load_model(checkpoint)
    assert not loaded.training
    assert tokenizer("ab")["input_ids"]
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_dtype_is_the_one_asked_for(checkpoint: Path) -> None:
    loaded, _ = load_model(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_an_encoder_loads_as_what_its_config_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = BertConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path)[0], BertModel)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_model(tmp_path / "tiny.gguf")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not hasattr(loaded.config, "quantization_config")

    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    again, same_tokenizer = load_model(saved)
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
    assert same_tokenizer("some text")["input_ids"] == tokenizer("some text")["input_ids"]


@pytest.mark.parametrize("kind", ["directory", "GGUF"])
def test_the_bars_of_transformers_can_be_hidden(
    kind: str,
    checkpoint: Path,
    tmp_path: Path,
    model: LlamaForCausalLM,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint
    if kind == "GGUF":
        source = tmp_path / "tiny.gguf"
        write_gguf(source, model)

    def printed() -> str:
        capsys.readouterr()
        load_model(source)
        return capsys.readouterr().err

    bar = "Loading weights" if kind == "directory" else "quantizing"
    with without_loading_bars():
        assert bar not in printed()
    assert bar in printed()  # as it was before
    with pytest.raises(ZeroDivisionError), without_loading_bars():
        1 / 0  # noqa: B018
    assert bar in printed()
    with without_loading_bars(hidden=False):
        assert bar in printed()


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    assert isinstance(load_model(tmp_path)[0], LlamaForCausalLM)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="needs the `gguf` package") as caught:
        load_model(tmp_path / "m.gguf")
    assert "zeroskip[gguf]" in (caught.value.next_step or "")


def test_a_gguf_file_cut_short(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    whole = path.read_bytes()
    # In the header, in the names of the tensors, in the tensors themselves.
    for length in (10, 700, whole.index(b"token_embd") + 20, 20_000):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="GGUF file cannot be loaded"):
            load_model(path)
        if length < 20_000:  # The tokenizer lies before the tensors.
            with pytest.raises(
                ArtifactError, match=r"tokenizer cannot be loaded|GGUF file cannot be"
            ):
                load_tokenizer(path)


def test_a_damaged_configuration_is_not_called_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read"):
        load_tokenizer(checkpoint)


def test_what_lies_in_an_artefact_is_named(tmp_path: Path) -> None:
    for name in ("checkpoint", "onnx"):
        (tmp_path / name).mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json") as caught:
        load_model(tmp_path)
    assert str(tmp_path / "checkpoint") in str(caught.value)
    assert str(tmp_path / "onnx") in str(caught.value)


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(ArtifactError, match="tokenizer cannot be loaded"):
        load_tokenizer(checkpoint)


def test_a_checkpoint_cut_short(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(checkpoint)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="tokenizer cannot be loaded"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_a_repository_name_is_never_downloaded(name: str) -> None:
    with pytest.raises(ArtifactError, match="no model here"):
        load_model(name)


def test_neither_directory_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="neither"):
        load_model(tmp_path / "weights.bin")
    with pytest.raises(ArtifactError, match=r"no config\.json and 0 GGUF files"):
        load_model(tmp_path)
