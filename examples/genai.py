"""A causal language model in onnxruntime-genai: compile, export, generate tokens, compare.

Without an argument the model is tiny and random and needs no files; with one it is a Hugging Face
directory, such as models/smollm2-135m-instruct. `pip install 'zeroskip[genai]'` brings the client.

    python examples/genai.py [MODEL] [--out FOLDER] [--prompt TEXT]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tiny_model import write_tiny_model

from zeroskip import calibration_from_text, compile_sparse, load_model
from zeroskip.ir.errors import CompileError
from zeroskip.passes import ApplyMasks, ExportOnnx, Observe, PruneWanda
from zeroskip.runtime.onnx.session import OnnxModel

CALIBRATION = Path(__file__).resolve().parent / "data" / "calibration.txt"


def main() -> None:
    """Dense model in, tokens from onnxruntime-genai out."""
    parser = argparse.ArgumentParser(description="Run a pruned model in onnxruntime-genai.")
    parser.add_argument("model", type=Path, nargs="?", help="default: a tiny random one")
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    parser.add_argument("--prompt", default="The state of our Union is")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="windows of calibration text")
    arguments = parser.parse_args()
    try:
        import onnxruntime_genai as genai
    except ImportError:
        sys.exit("onnxruntime-genai is missing: pip install 'zeroskip[genai]'")
    out = arguments.out or Path(tempfile.mkdtemp(prefix="zeroskip-genai-"))
    source = arguments.model
    if source is None:
        source = out / "dense"
        write_tiny_model(source)

    model, tokenizer = load_model(source)
    compiled = compile_sparse(
        model,
        # Dense weights with zeros: onnxruntime-genai registers no operators of others.
        passes=[Observe(), PruneWanda("2:4"), ApplyMasks(), ExportOnnx(out / "onnx")],
        calibration=calibration_from_text(
            CALIBRATION, tokenizer, samples=arguments.samples, sequence_length=128
        ),
    )
    print(f"density {compiled.report.density:.2f}")

    prompt = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
    client = genai.Model(str(out / "onnx"))  # reads genai_config.json, which the export wrote
    options = genai.GeneratorParams(client)
    options.set_search_options(max_length=prompt.shape[1] + arguments.new_tokens)
    generator = genai.Generator(client, options)
    generator.append_tokens(prompt.numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    print(f"onnxruntime-genai: {tokenizer.decode(tokens)!r}")

    expected = OnnxModel(out / "onnx").generate(prompt, len(tokens) - prompt.shape[1])
    if expected[0].tolist() != tokens:
        sys.exit("onnxruntime-genai and ONNX Runtime give different tokens.")
    print(f"the same {len(tokens) - prompt.shape[1]} tokens as ONNX Runtime")
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except CompileError as error:
        sys.exit(f"error: {error}")
