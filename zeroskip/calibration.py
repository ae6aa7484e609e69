"""Calibration inputs: windows of a text, chosen by a seed, and windows that the model writes itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zeroskip.ir.errors import CalibrationError
from zeroskip.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from zeroskip.recipe_document import CalibrationOptions

# Windows that are written together: enough for fast products, few enough for their caches.
_WRITTEN_AT_ONCE = 64


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


def generate_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 32,
    sequence_length: int = 512,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Lets a dense language model write windows for `compile_sparse(..., calibration=...)`.

    Each begins with a token drawn from the vocabulary without its special tokens; those after it
    are drawn from what the model expects, at temperature 1. So they look like what the model was
    trained on, whatever text is at hand, and a pruned model keeps more of what that text does not
    show. Use them beside windows of a text (`mixed`), not instead.

    Source: Williams et al., "Self-calibration for Language Model Quantization and Pruning", arXiv
    2410.17170; a first token at random as in Liu et al., LLM-QAT, arXiv 2305.17888.

    Args:
        model: A causal language model with a cache.
        tokenizer: The tokenizer of the model.
        samples: Number of windows.
        sequence_length: Tokens in a window.
        seed: The same seed gives the same windows, on the same machine with as many threads: where
            a sum is rounded otherwise, another token may be drawn.

    Returns:
        One batch of one window each, as from `calibration_from_text`.

    Raises:
        CalibrationError: The model keeps no cache, or its logits are not finite.
    """
    if samples < 1 or sequence_length < 1:
        raise CalibrationError(
            f"{samples} samples of {sequence_length} tokens are no calibration data.",
            next_step="Ask for at least one sample of at least one token.",
        )
    special = set(tokenizer.all_special_ids)
    known = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    ordinary = sorted(t for t in tokenizer.get_vocab().values() if t not in special and t < known)
    first = torch.tensor(ordinary)
    generator = torch.Generator().manual_seed(seed)
    tokens = first[torch.randint(len(first), (samples, 1), generator=generator)]
    written = [
        _continued(model, tokens[start : start + _WRITTEN_AT_ONCE], sequence_length, generator)
        for start in range(0, samples, _WRITTEN_AT_ONCE)
    ]
    return [
        {
            "input_ids": row.unsqueeze(0),
            "attention_mask": torch.ones(1, len(row), dtype=torch.int64),
        }
        for row in torch.cat(written)
    ]


def calibration_for(
    options: CalibrationOptions,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dense: Callable[[], PreTrainedModel],
) -> list[dict[str, torch.Tensor]]:
    """Makes the calibration data that a recipe asks for.

    Args:
        options: How many windows of which kind.
        text: A UTF-8 file, or the text itself.
        tokenizer: The tokenizer of the model.
        dense: Gives the dense model; called only when it is to write windows.

    Raises:
        CalibrationError: As from `calibration_from_text` and `generate_calibration`.
    """
    length, seed = options.sequence_length, options.seed
    batches = calibration_from_text(
        text, tokenizer, samples=options.samples, sequence_length=length, seed=seed
    )
    if not options.generated:
        return batches
    written = generate_calibration(
        dense(), tokenizer, samples=options.generated, sequence_length=length, seed=seed
    )
    return mixed(batches, written)


def _continued(
    model: PreTrainedModel, tokens: torch.Tensor, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws token after token until each row has `length` of them."""
    columns, cache = [tokens], None
    with torch.inference_mode():
        while len(columns) < length:
            found = model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
            cache = getattr(found, "past_key_values", None)
            if cache is None:
                raise CalibrationError(
                    "The model keeps no cache, so it cannot write calibration windows.",
                    where=type(model).__name__,
                    next_step="Take windows of a text only: leave `generated` out.",
                )
            shares = torch.softmax(found.logits[:, -1].float(), -1)
            if not torch.isfinite(shares).all():
                raise CalibrationError(
                    "The logits of the model are not finite.", where=type(model).__name__
                )
            columns.append(torch.multinomial(shares, 1, generator=generator))
    return torch.cat(columns, 1).clone()


def mixed(
    batches: Sequence[dict[str, torch.Tensor]], others: Sequence[dict[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """Spreads two lists of batches evenly over one, so that any part of it has its share of both."""
    places = [
        ((i + 0.5) / len(part), part[i]) for part in (batches, others) for i in range(len(part))
    ]
    return [batch for _, batch in sorted(places, key=lambda place: place[0])]


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
