"""Calibration inputs from plain text: windows of tokens, chosen by a seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zeroskip.ir.errors import CalibrationError
from zeroskip.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_from_text(
    path_or_text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 32,
    sequence_length: int = 512,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Cuts windows out of a text for `compile_sparse(..., calibration=...)`.

    The windows do not overlap while the text is long enough for that; in a shorter text they start
    at different tokens and a warning says that they overlap. They come in the order of the text, and
    without special tokens, since nearly all of them begin in the middle of it.

    Args:
        path_or_text: A UTF-8 file, or the text itself.
        tokenizer: The tokenizer of the model.
        samples: Number of windows.
        sequence_length: Tokens in a window.
        seed: Chooses the windows; the same seed gives the same ones.
        vocab_size: The model's vocabulary; token ids beyond it are refused here, where the text and
            the tokenizer are known.

    Returns:
        One batch of one window each: `input_ids` (int64) and `attention_mask` (ones).

    Raises:
        CalibrationError: The text is empty, not UTF-8 or too short, or does not fit the model.
    """
    if samples < 1 or sequence_length < 1:
        raise CalibrationError(
            f"{samples} samples of {sequence_length} tokens are no calibration data.",
            next_step="Ask for at least one sample of at least one token.",
        )
    text = read_text(path_or_text, CalibrationError)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(encoded, dtype=torch.int64)
    _check_tokens(tokens, samples, sequence_length, vocab_size)
    return [
        {
            "input_ids": tokens[start : start + sequence_length].unsqueeze(0),
            "attention_mask": torch.ones(1, sequence_length, dtype=torch.int64),
        }
        for start in _starts(len(tokens), samples, sequence_length, seed)
    ]


def _check_tokens(
    tokens: torch.Tensor, samples: int, sequence_length: int, vocab_size: int | None
) -> None:
    needed = sequence_length + samples - 1  # the fewest that hold `samples` different windows
    if len(tokens) < needed:
        raise CalibrationError(
            f"The text has {len(tokens)} tokens; {samples} windows of {sequence_length} need at "
            f"least {needed}, and {samples * sequence_length} if they are not to overlap.",
            next_step="Give more text, fewer samples or a shorter sequence length.",
        )
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise CalibrationError(
            f"The tokenizer gives token {int(tokens.max())}, but the model knows {vocab_size}.",
            next_step="Use the tokenizer that belongs to the model.",
        )


def _starts(length: int, samples: int, width: int, seed: int) -> list[int]:
    """Where the windows begin: every placement without overlap is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    slack = length - samples * width
    if slack >= 0:
        # The gaps before the windows sum to at most `slack`: choose `samples` of slack + samples
        # places, which numbers the ways to share the slack out.
        places = torch.randperm(slack + samples, generator=generator)[:samples].sort().values
        return [int(place) + i * (width - 1) for i, place in enumerate(places)]
    warnings.warn(
        f"The calibration windows overlap: the text has {length} tokens, and {samples} windows of "
        f"{width} hold {samples * width}.",
        stacklevel=3,
    )
    return torch.randperm(length - width + 1, generator=generator)[:samples].sort().values.tolist()
