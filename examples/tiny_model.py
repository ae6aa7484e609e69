"""Writes a tiny random LLaMA and a tokenizer of bytes, to try every command in seconds.

It knows no language: perplexities say nothing, but every file and every command is the real one.

    python examples/tiny_model.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write_tiny_model(folder: Path, layers: int = 2) -> None:
    """Writes a Hugging Face directory: hidden size 64, the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main() -> None:
    """Writes the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tiny_model.py FOLDER")
    write_tiny_model(Path(sys.argv[1]))
    print(f"written to {sys.argv[1]}")


if __name__ == "__main__":
    main()
