"""Perplexity of a model, a compiled model or an ONNX file on a text, by one procedure for all.

With tokens t_0 ... t_n, a window of L inputs t_b ... t_(b+L-1) predicts t_(b+1) ... t_(b+L). Windows
begin every `stride` tokens, and each one scores only the predictions that no earlier window made,
so every token but the first is scored exactly once; with stride = L that is one pass over the text.
(The common recipe that cuts the text into windows and shifts the labels inside each of them skips
the first token of every window: at L = 1024 that is one token in a thousand.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from zeroskip.ir.errors import EvaluationError
from zeroskip.targets import Logits, load_target, logits_of
from zeroskip.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = torch.Tensor | Sequence[int]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text, and all it takes to measure the same again.

    Args:
        perplexity: exp(negative_log_likelihood).
        negative_log_likelihood: Mean over the scored tokens, in nats.
        tokens: Number of tokens scored.
        sequence_length: Inputs in a window.
        stride: Distance between the beginnings of two windows.
        seconds: Wall-clock time of the scoring, without loading.
    """

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    sequence_length: int
    stride: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} ({self.negative_log_likelihood:.6f} nats per token) "
            f"over {self.tokens} tokens, windows of {self.sequence_length} every {self.stride}, "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Window:
    """Inputs begin ... end - 1, of which those from `scored` on are scored on the token after."""

    begin: int
    scored: int
    end: int


def perplexity(
    target: Any,
    text_or_ids: str | Path | Tokens,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Perplexity:
    """Scores a text.

    Args:
        target: A Hugging Face model, a CompiledModel, an OnnxModel, or the path of one: a folder
            with model.onnx, a Hugging Face directory, or a GGUF file.
        text_or_ids: A UTF-8 file, the text itself, or its token ids.
        tokenizer: Needed for a text, unless `target` is a path with a tokenizer in it.
        sequence_length: Inputs in a window.
        stride: Distance between windows; `sequence_length` when None. A smaller stride gives every
            token at least sequence_length - stride tokens of context and costs more.
        max_tokens: Score at most this many tokens, from the beginning of the text.
        batch_size: Windows that run together; the result does not depend on it.
        progress: Whether to draw a progress bar on stderr.

    Raises:
        EvaluationError: The text has fewer than two tokens, the window does not fit the model, or
            the logits are not finite.
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length or batch_size < 1:
        raise EvaluationError(
            f"A stride of {stride} and batches of {batch_size} do not work with windows of "
            f"{sequence_length}.",
            next_step="Choose 1 <= stride <= sequence_length and a batch size of at least 1.",
        )
    if isinstance(target, str | Path):
        target, tokenizer = load_target(target, tokenizer)
    tokens = encode(text_or_ids, tokenizer, max_tokens)
    _check_fit(target, tokens, sequence_length)
    planned = list(windows(len(tokens), sequence_length, stride))
    total, started = 0.0, time.perf_counter()
    with (
        torch.inference_mode(),
        logits_of(target) as logits,
        _bar(progress, len(planned)) as advance,
    ):
        for batch in _batches(planned, batch_size):
            total += _score(logits, tokens, batch)
            advance(len(batch))
    mean = total / (len(tokens) - 1)
    return Perplexity(
        math.exp(mean) if mean < 700 else math.inf,  # exp overflows a float above 709
        mean,
        len(tokens) - 1,
        sequence_length,
        stride,
        time.perf_counter() - started,
    )


def encode(
    text_or_ids: str | Path | Tokens,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Returns the token ids to evaluate, [n] int64: at most max_tokens + 1, at least two."""
    if isinstance(text_or_ids, str | Path):
        text = read_text(text_or_ids, EvaluationError)
        if tokenizer is None:
            raise EvaluationError(
                "A text needs a tokenizer.", next_step="Pass tokenizer=, or token ids."
            )
        text_or_ids = tokenizer(text, verbose=False)["input_ids"]
    tokens = torch.as_tensor(text_or_ids)
    if tokens.is_floating_point() or tokens.numel() != max(tokens.shape, default=0):
        raise EvaluationError(
            f"Token ids are integers in one dimension, not {tokens.dtype} {tuple(tokens.shape)}."
        )
    tokens = tokens.reshape(-1).to("cpu", torch.int64)
    if max_tokens is not None:
        tokens = tokens[: max(max_tokens, 0) + 1]
    if len(tokens) < 2:
        raise EvaluationError(
            f"The text has {len(tokens)} tokens; scoring takes at least two.",
            next_step="Give more text, or a larger max_tokens.",
        )
    return tokens


def windows(length: int, sequence_length: int, stride: int) -> Iterator[Window]:
    """Covers the inputs 0 ... length - 2, each scored by exactly one window."""
    begin = scored = 0
    while scored < length - 1:
        end = min(begin + sequence_length, length - 1)
        yield Window(begin, scored, end)
        begin, scored = begin + stride, end


def _batches(planned: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Groups windows of the same length (only the last one may be shorter)."""
    for _, same in groupby(planned, key=lambda window: window.end - window.begin):
        together = list(same)
        yield from (together[i : i + size] for i in range(0, len(together), size))


def _score(logits: Logits, tokens: torch.Tensor, batch: Sequence[Window]) -> float:
    """The summed negative log-likelihood of a batch: float32 a window, float64 the sum."""
    scores = logits(torch.stack([tokens[window.begin : window.end] for window in batch]))
    length = batch[0].end - batch[0].begin
    if scores.ndim != 3 or scores.shape[:2] != (len(batch), length):
        raise EvaluationError(
            f"The model gave logits {tuple(scores.shape)} for inputs {(len(batch), length)}.",
            next_step="Give a causal language model with logits for every position.",
        )
    total = 0.0
    for window, rows in zip(batch, scores, strict=True):
        rows = rows[window.scored - window.begin :].float()
        labels = tokens[window.scored + 1 : window.end + 1].to(rows.device)
        losses = cross_entropy(rows, labels, reduction="none").double()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            raise EvaluationError(
                f"The loss of token {window.scored + 1 + int(bad[0])} is {float(losses[bad[0]])}.",
                next_step="Look for NaN or inf in the weights, or evaluate in float32.",
            )
        total += float(losses.sum())
    return total


def _check_fit(target: Any, tokens: torch.Tensor, sequence_length: int) -> None:
    """Refuses what a model would answer with an index error, or with nonsense."""
    program = getattr(target, "program", None)  # Of a checkpoint: no live model has the config.
    model = getattr(target, "model", None) or getattr(program, "model", None) or target
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and min(sequence_length, len(tokens) - 1) > longest:
        raise EvaluationError(
            f"Windows of {sequence_length} tokens do not fit: the model has {longest} positions.",
            next_step=f"Use a sequence length of at most {longest}.",
        )
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise EvaluationError(
            f"The tokens run from {int(tokens.min())} to {int(tokens.max())}, but the model knows "
            f"{vocabulary}.",
            next_step="Use the tokenizer that belongs to the model.",
        )


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda count: bar.advance(task, count)
