"""A tokenizer and a language model small enough to make in a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.kept_traces import keep_translations

VOCABULARY = 256


@pytest.fixture(scope="module", autouse=True)
def _graphs_are_translated_once() -> Iterator[None]:
    """Commands translate to ONNX for real when they meet a graph first, and in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeroskip.runtime.onnx.translate._standard_operators", keep_translations())
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no special tokens: token counts are byte counts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def small_llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return small_llama(layers=2)


@pytest.fixture
def checkpoint(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model and the tokenizer as a Hugging Face directory."""
    directory = tmp_path / "dense"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def shallow(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """As `checkpoint`, with one layer: an ONNX export takes seconds for each."""
    directory = tmp_path / "shallow"
    small_llama(layers=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Two thousand tokens."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 26) for i in range(2000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An artefact with packed weights in ONNX, its inputs beside it; not to be changed."""
    from tests.face.artefacts import compile_in, write_inputs

    folder = tmp_path_factory.mktemp("built")
    write_inputs(folder, tokenizer)
    assert compile_in(folder, "out") == 0
    return folder / "out"
