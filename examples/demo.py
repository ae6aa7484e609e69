"""A real language model, from dense PyTorch to 2:4-sparse ONNX, with its perplexity on the way.

SmolLM2-135M-Instruct (`make models` fetches it) is measured, compiled with Wanda 2:4, exported,
run in ONNX Runtime with its key/value cache, and measured again. `make demo` runs this.

    python examples/demo.py [--out FOLDER] [--samples 32] [--sequence-length 512] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from zeroskip import compile_sparse
from zeroskip.calibration import calibration_from_text
from zeroskip.evaluate import perplexity
from zeroskip.ir.errors import CompileError
from zeroskip.models import load_model
from zeroskip.passes import ApplyMasks, ExportOnnx, Observe, PruneWanda
from zeroskip.runtime.onnx.session import OnnxModel

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES.parent / "models" / "smollm2-135m-instruct"


def parse_arguments() -> argparse.Namespace:
    """Reads the sizes; smaller ones finish sooner and prune less well."""
    parser = argparse.ArgumentParser(description="Compile SmolLM2-135M to 2:4 sparsity.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to measure on")
    parser.add_argument("--prompt", default="My fellow Americans, the state of our Union is")
    parser.add_argument("--new-tokens", type=int, default=24)
    return parser.parse_args()


def main() -> None:
    """Measure, compile, run, measure."""
    arguments = parse_arguments()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="zeroskip-demo-"))
    model, tokenizer = load_model(arguments.model)

    def measure() -> str:
        text = EXAMPLES / "data" / "evaluation.txt"
        return str(perplexity(model, text, tokenizer=tokenizer, max_tokens=arguments.tokens))

    print(f"dense:  {measure()}", flush=True)
    compiled = compile_sparse(
        model,
        passes=[Observe(), PruneWanda("2:4"), ApplyMasks(), ExportOnnx(out / "onnx")],
        calibration=calibration_from_text(
            EXAMPLES / "data" / "calibration.txt",
            tokenizer,
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
        ),
        progress=sys.stderr.isatty(),
    )
    print(compiled.report)
    compiled.save_pretrained(out / "checkpoint")
    tokenizer.save_pretrained(out / "checkpoint")

    prompt = torch.tensor([tokenizer(arguments.prompt)["input_ids"]])
    words = OnnxModel(out / "onnx").generate(prompt, arguments.new_tokens)
    print(f"ONNX Runtime: {tokenizer.decode(words[0])!r}", flush=True)
    print(f"sparse: {measure()}")
    print(f"checkpoint (Hugging Face): {out / 'checkpoint'}")
    print(f"model.onnx:                {out / 'onnx'}")


if __name__ == "__main__":
    try:
        main()
    except CompileError as error:
        sys.exit(f"error: {error}")
