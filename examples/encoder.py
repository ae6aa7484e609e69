"""A sentence encoder, pruned and exported: do its embeddings still mean the same?

all-MiniLM-L6-v2 (`make models` fetches it) is pruned to 50 % with SparseGPT, packed where that pays,
written as ONNX and run in ONNX Runtime. Printed are the cosine similarity of each sentence's
embedding before and after, how similar pairs of sentences are before and after, bytes and times.

    python examples/encoder.py [--model FOLDER] [--out FOLDER] [--pattern 50%]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from transformers import PreTrainedTokenizerBase

import zeroskip
from zeroskip.ir.errors import CompileError
from zeroskip.passes import ExportOnnx, LowerSparseLinear, Observe, PruneSparseGPT

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES.parent / "models" / "all-minilm-l6-v2"
# Three pairs that mean nearly the same, and sentences between pairs that do not.
SENTENCES = [
    "The cat sleeps on the warm sofa.",
    "A kitten is napping on the couch.",
    "Interest rates were raised by the central bank.",
    "The bank made borrowing more expensive.",
    "He forgot his umbrella and got wet in the rain.",
    "Without an umbrella, the shower soaked him.",
]


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, torch.Tensor]:
    """The inputs of the model for some texts."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over tokens that are not padding, of length one: the embedding of the model card."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean)


def main() -> None:
    """Embed, compile, embed again, compare."""
    parser = argparse.ArgumentParser(description="Prune a sentence encoder.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    parser.add_argument("--pattern", default="50%")
    parser.add_argument("--samples", type=int, default=256, help="sentences of calibration text")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="zeroskip-encoder-"))

    model, tokenizer = zeroskip.load_model(arguments.model)
    inputs = tokens_of(tokenizer, SENTENCES)
    with torch.no_grad():
        before = pooled(model(**inputs).last_hidden_state, inputs["attention_mask"])

    # An encoder is calibrated on texts as it will meet them: whole, padded, with special tokens.
    text = (EXAMPLES / "data" / "calibration.txt").read_text(encoding="utf-8")
    sentences = [line for line in text.replace(". ", ".\n").splitlines() if len(line) > 40]
    chosen = sentences[:: max(1, len(sentences) // arguments.samples)][: arguments.samples]
    started = time.perf_counter()
    compiled = zeroskip.compile_sparse(
        model,
        passes=[
            Observe(gram=True),
            PruneSparseGPT(arguments.pattern),
            LowerSparseLinear(m=(16, 128)),  # rows it will run with: sentences times tokens
            ExportOnnx(out / "onnx"),
        ],
        calibration=[tokens_of(tokenizer, chosen[i : i + 8]) for i in range(0, len(chosen), 8)],
    )
    tokenizer.save_pretrained(out / "onnx")
    print(compiled.report)
    print(f"compiled and exported in {time.perf_counter() - started:.1f} s")

    # From here on nothing but onnxruntime; session_options() registers the sparse kernels.
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", zeroskip.session_options())
    names = {value.name for value in session.get_inputs()}
    feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
    started = time.perf_counter()
    hidden = session.run(["last_hidden_state"], feeds)[0]
    milliseconds = 1000 * (time.perf_counter() - started)
    after = pooled(torch.from_numpy(hidden), inputs["attention_mask"])

    for sentence, cosine in zip(SENTENCES, (before * after).sum(1).tolist(), strict=True):
        print(f"cosine before/after {cosine:.4f}  {sentence}")
    print("pairs of near equal meaning, and the most similar other sentence:")
    for name, embedding in (("dense", before), ("sparse", after)):
        similar = embedding @ embedding.T
        pairs = [similar[i, i + 1].item() for i in (0, 2, 4)]
        others = max(similar[i, j].item() for i in range(6) for j in range(i) if i // 2 != j // 2)
        print(f"  {name}: {', '.join(f'{pair:.3f}' for pair in pairs)}; others {others:.3f}")
    print(f"mean cosine {(before * after).sum(1).mean():.4f}, first run {milliseconds:.1f} ms")
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except CompileError as error:
        sys.exit(f"error: {error}")
