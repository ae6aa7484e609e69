"""Generates with onnxruntime-genai from a folder that zeroskip exported, and compares the tokens.

    python examples/tiny_model.py tiny        # or any causal language model on disk
    zeroskip compile tiny --recipe examples/recipes/deploy.yaml --out sparse
    python examples/genai.py sparse/onnx

The export wrote genai_config.json beside model.onnx; `pip install 'zeroskip[genai]'` brings the
client. It gets dense weights with zeros: it does not register the operator of packed ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from zeroskip.ir.errors import CompileError
from zeroskip.runtime.onnx.custom_ops import uses_sparse_linear
from zeroskip.runtime.onnx.session import OnnxModel


def generate(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Returns the most likely tokens behind the prompt, from onnxruntime-genai."""
    import onnxruntime_genai as genai

    client = genai.Model(str(folder))
    options = genai.GeneratorParams(client)
    options.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(client, options)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def main() -> None:
    """Generates twice, by two clients."""
    parser = argparse.ArgumentParser(description="Run an exported model in onnxruntime-genai.")
    parser.add_argument("folder", type=Path, help="a folder with model.onnx and genai_config.json")
    parser.add_argument("--prompt", default="The state of our Union is")
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "genai_config.json").is_file():
        sys.exit(f"there is no genai_config.json in {folder}: export a causal language model")
    if uses_sparse_linear(folder / "model.onnx"):
        sys.exit("packed weights: write a plain folder with `zeroskip export FOLDER --dense`")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(arguments.prompt).ids
    tokens = generate(folder, prompt, arguments.new_tokens)
    print(f"onnxruntime-genai: {tokenizer.decode(tokens)!r}")

    # The client stops at an end-of-sequence token, so as many are compared as it gave.
    expected = OnnxModel(folder).generate(torch.tensor([prompt]), len(tokens))
    if expected[0, len(prompt) :].tolist() != tokens:
        sys.exit("onnxruntime-genai and ONNX Runtime give different tokens.")
    print(f"the same {len(tokens)} tokens as ONNX Runtime")


if __name__ == "__main__":
    try:
        main()
    except CompileError as error:
        sys.exit(f"error: {error}")
