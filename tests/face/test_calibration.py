from __future__ import annotations

import random
import string
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zeroskip.calibration import (
    calibration_for,
    calibration_from_text,
    generate_calibration,
    mixed,
)
from zeroskip.ir.errors import CalibrationError
from zeroskip.recipe_document import CalibrationOptions

# No two windows of it are alike, so a window tells where it begins.
TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=1000))


def starts_of(batches: list[dict[str, torch.Tensor]], tokens: list[int]) -> list[int]:
    """Where each window begins in the text; ValueError when it is no contiguous part of it."""
    starts = []
    for batch in batches:
        row = batch["input_ids"][0].tolist()
        places = range(len(tokens) - len(row) + 1)
        starts.append([tokens[place : place + len(row)] == row for place in places].index(True))
    return starts


def test_shapes_and_types(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = calibration_from_text(TEXT, tokenizer, samples=4, sequence_length=100)
    assert len(batches) == 4
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        for tensor in batch.values():
            assert tensor.shape == (1, 100)
            assert tensor.dtype == torch.int64
        assert bool((batch["attention_mask"] == 1).all())


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_contiguous_and_do_not_overlap(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    tokens = tokenizer(TEXT)["input_ids"]
    batches = calibration_from_text(TEXT, tokenizer, samples=9, sequence_length=100, seed=seed)
    starts = starts_of(batches, tokens)
    assert len(starts) == 9
    assert all(later - sooner >= 100 for sooner, later in pairwise(starts))


def test_a_text_of_exactly_the_needed_length_is_used_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batches = calibration_from_text(TEXT, tokenizer, samples=10, sequence_length=100, seed=5)
    joined = torch.cat([batch["input_ids"][0] for batch in batches]).tolist()
    assert joined == tokenizer(TEXT)["input_ids"]


def test_the_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    def windows(seed: int) -> torch.Tensor:
        batches = calibration_from_text(TEXT, tokenizer, samples=3, sequence_length=50, seed=seed)
        return torch.cat([batch["input_ids"] for batch in batches])

    assert torch.equal(windows(1), windows(1))
    assert not torch.equal(windows(1), windows(2))


def test_a_file_and_its_text_give_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    windows = [
        torch.cat(
            [
                batch["input_ids"]
                for batch in calibration_from_text(source, tokenizer, samples=3, sequence_length=50)
            ]
        )
        for source in (path, str(path), TEXT)
    ]
    assert torch.equal(windows[0], windows[1])
    assert torch.equal(windows[0], windows[2])


def test_a_short_text_overlaps_with_a_warning(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(UserWarning, match="overlap"):
        batches = calibration_from_text(TEXT[:120], tokenizer, samples=5, sequence_length=100)
    starts = starts_of(batches, tokenizer(TEXT[:120])["input_ids"])
    assert len(set(starts)) == 5


def test_no_warning_when_nothing_overlaps(tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration_from_text(TEXT, tokenizer, samples=10, sequence_length=100)


def test_too_short_says_how_much_there_is_and_is_needed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(CalibrationError, match=r"1000 tokens.*at least 1001.*2000") as caught:
        calibration_from_text(TEXT, tokenizer, samples=2, sequence_length=1000)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"abc\xff\xfe", "not UTF-8: byte 3")],
)
def test_unusable_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration_from_text(path, tokenizer)
    assert caught.value.where == str(path)


def test_a_missing_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibration_from_text(tmp_path / "absent.txt", tokenizer)


def test_a_vocabulary_that_is_too_small(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match=r"gives token \d+, but the model knows 10"):
        calibration_from_text(TEXT, tokenizer, samples=1, sequence_length=10, vocab_size=10)


@pytest.mark.parametrize(("samples", "sequence_length"), [(0, 10), (1, 0), (-1, 10)])
def test_nothing_asked_for(
    tokenizer: PreTrainedTokenizerFast, samples: int, sequence_length: int
) -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        calibration_from_text(TEXT, tokenizer, samples=samples, sequence_length=sequence_length)


def test_a_model_writes_what_it_expects(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model that is sure of token 7 after every token writes nothing else."""
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[7] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    batches = generate_calibration(model, tokenizer, samples=3, sequence_length=5)
    assert len(batches) == 3
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 5)
        assert bool((batch["input_ids"][0, 1:] == 7).all())
    assert len({int(batch["input_ids"][0, 0]) for batch in batches}) > 1


def test_windows_follow_the_model_token_by_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With a cache or without, the same seed draws the same tokens."""
    batches = generate_calibration(model, tokenizer, samples=4, sequence_length=12, seed=3)
    written = torch.cat([batch["input_ids"] for batch in batches])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(256, (4, 1), generator=generator)
    with torch.no_grad():
        while tokens.shape[1] < 12:
            shares = model(input_ids=tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    assert torch.equal(written, tokens)
    again = generate_calibration(model, tokenizer, samples=4, sequence_length=12, seed=4)
    assert not torch.equal(written, torch.cat([batch["input_ids"] for batch in again]))


def test_special_tokens_begin_no_window(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    special = [tokenizer.convert_ids_to_tokens(i) for i in range(250)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, additional_special_tokens=special
    )
    batches = generate_calibration(model, tokenizer, samples=40, sequence_length=1)
    assert {int(batch["input_ids"]) for batch in batches} <= set(range(250, 256))


def test_a_model_that_cannot_write(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        generate_calibration(model, tokenizer, samples=0)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        generate_calibration(model, tokenizer, samples=2, sequence_length=3)

    class WithoutCache(LlamaForCausalLM):
        def forward(self, **inputs: object) -> object:  # type: ignore[override]
            return super().forward(**{**inputs, "use_cache": False})  # type: ignore[arg-type]

    with pytest.raises(CalibrationError, match="no cache"):
        generate_calibration(WithoutCache(model.config), tokenizer, samples=2, sequence_length=3)


def test_mixing_spreads_evenly() -> None:
    def numbered(first: int, count: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.tensor([[first + i]])} for i in range(count)]

    found = mixed(numbered(0, 6), numbered(100, 3))
    assert [int(batch["input_ids"]) for batch in found] == [0, 100, 1, 2, 101, 3, 4, 102, 5]
    assert [int(batch["input_ids"]) for batch in mixed(numbered(0, 2), [])] == [0, 1]


def test_a_recipe_asks_for_both(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = CalibrationOptions(samples=4, sequence_length=10, seed=2, generated=2)
    found = calibration_for(options, TEXT, tokenizer, lambda: model)
    text = calibration_from_text(TEXT, tokenizer, samples=4, sequence_length=10, seed=2)
    written = generate_calibration(model, tokenizer, samples=2, sequence_length=10, seed=2)
    assert str(found) == str(mixed(text, written))

    def missing() -> LlamaForCausalLM:
        raise AssertionError("nothing is to be written")

    options = CalibrationOptions(samples=4, sequence_length=10, seed=2)
    assert str(calibration_for(options, TEXT, tokenizer, missing)) == str(text)
