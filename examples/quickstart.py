"""Compiles a tiny LLaMA to 2:4 sparsity, exports it to ONNX, and runs the ONNX file.

The model is random and built here, so this needs no files and no network: about half a minute.

    python examples/quickstart.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zeroskip import compile_sparse
from zeroskip.passes import ApplyMasks, ExportOnnx, PruneMagnitude
from zeroskip.runtime.onnx.session import OnnxModel


def tiny_llama() -> LlamaForCausalLM:
    """A LLaMA of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Dense model in, sparse ONNX file out."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="quickstart-"))
    model = tiny_llama()
    compiled = compile_sparse(
        model,
        passes=[
            PruneMagnitude("2:4"),  # decides which weights go; changes no number yet
            ApplyMasks(),  # sets them to zero
            ExportOnnx(folder / "onnx"),
        ],
    )
    print(compiled.report)

    # The model that went in now holds the sparse weights, and is still an ordinary one.
    weight = model.model.layers[0].mlp.up_proj.weight
    print(f"zeros in a pruned weight: {(weight == 0).float().mean():.0%}")

    prompt = torch.randint(256, (1, 8))
    torch_tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    onnx_tokens = OnnxModel(folder / "onnx").generate(prompt, 8)
    print(f"PyTorch:      {torch_tokens[0, 8:].tolist()}")
    print(f"ONNX Runtime: {onnx_tokens[0, 8:].tolist()}")
    if not torch.equal(torch_tokens, onnx_tokens):
        sys.exit("The ONNX file does not compute what the model computes.")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
