from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zeroskip.compile import compile_sparse
from zeroskip.evaluate import perplexity, windows
from zeroskip.ir.errors import EvaluationError
from zeroskip.passes import ApplyMasks, ExportOnnx, PruneMagnitude
from zeroskip.runtime.onnx.session import OnnxModel

IDS = torch.randint(256, (301,), generator=torch.Generator().manual_seed(3))


def naive(model: LlamaForCausalLM, ids: list[int], length: int, stride: int) -> tuple[float, int]:
    """Mean loss and number of tokens: one token at a time, in float64, sharing no code."""
    losses: dict[int, float] = {}
    begin = 0
    while len(losses) < len(ids) - 1:
        window = ids[begin : min(begin + length, len(ids) - 1)]
        with torch.no_grad():
            probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1)
        for place in range(len(window)):
            losses.setdefault(
                begin + place + 1, -math.log(probabilities[place, ids[begin + place + 1]])
            )
        begin += stride
    return sum(losses.values()) / len(losses), len(losses)


@pytest.mark.parametrize(
    ("length", "stride"), [(50, None), (64, None), (64, 16), (64, 63), (100, 1), (128, 100)]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_agrees_with_the_naive_reference(
    model: LlamaForCausalLM, length: int, stride: int | None, batch_size: int
) -> None:
    ids = IDS[:150].tolist()
    result = perplexity(model, ids, sequence_length=length, stride=stride, batch_size=batch_size)
    expected, count = naive(model, ids, length, stride or length)
    assert result.tokens == count == 149
    assert result.negative_log_likelihood == pytest.approx(expected, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.sequence_length, result.stride) == (length, stride or length)


def test_agrees_with_the_loss_of_transformers(model: LlamaForCausalLM) -> None:
    ids = IDS[:100].unsqueeze(0)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    result = perplexity(model, ids, sequence_length=128)
    assert result.negative_log_likelihood == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", [2, 3, 17, 64, 65, 66, 129])
@pytest.mark.parametrize(("width", "stride"), [(64, 64), (64, 32), (64, 1), (1, 1), (7, 5)])
def test_every_token_but_the_first_is_scored_once(length: int, width: int, stride: int) -> None:
    scored = [
        place + 1
        for window in windows(length, width, stride)
        for place in range(window.scored, window.end)
    ]
    assert scored == list(range(1, length))
    assert all(w.end - w.begin <= width for w in windows(length, width, stride))


def test_max_tokens_counts_scored_tokens(model: LlamaForCausalLM) -> None:
    assert perplexity(model, IDS, sequence_length=64, max_tokens=100).tokens == 100
    assert perplexity(model, IDS, sequence_length=64, max_tokens=10_000).tokens == 300


def test_text_file_and_ids_agree(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    text = text_file.read_text(encoding="utf-8")
    results = [
        perplexity(model, source, tokenizer=tokenizer, sequence_length=100, max_tokens=500)
        for source in (text_file, str(text_file), text, tokenizer(text)["input_ids"])
    ]
    assert len({result.negative_log_likelihood for result in results}) == 1


def test_a_checkpoint_directory_brings_its_tokenizer(
    model: LlamaForCausalLM, checkpoint: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from_disk = perplexity(checkpoint, text_file, sequence_length=64, max_tokens=200)
    in_memory = perplexity(
        model, text_file, tokenizer=tokenizer, sequence_length=64, max_tokens=200
    )
    assert from_disk.negative_log_likelihood == in_memory.negative_log_likelihood


class Bare:
    """A target that is not a module; answers in the form it is told to."""

    def __init__(self, model: LlamaForCausalLM, form: str) -> None:
        self.inner, self.form = model, form

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = self.inner(input_ids, attention_mask=attention_mask).logits
        return {"tensor": logits, "tuple": (logits, None), "dict": {"logits": logits}}[self.form]


class Session:
    """A target with the method of an OnnxModel."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.inner = model

    def logits(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
        return self.inner(input_ids).logits, ()


def test_other_targets(model: LlamaForCausalLM) -> None:
    expected = perplexity(model, IDS, sequence_length=64).negative_log_likelihood
    targets = [*(Bare(model, form) for form in ("tensor", "tuple", "dict")), Session(model)]
    for target in targets:
        result = perplexity(target, IDS, sequence_length=64)
        assert result.negative_log_likelihood == pytest.approx(expected, abs=1e-6)


def test_an_onnx_file_without_a_cache(model: LlamaForCausalLM, tmp_path: Path) -> None:
    compile_sparse(model, [ExportOnnx(tmp_path / "onnx", form="plain")])
    exported = OnnxModel(tmp_path / "onnx")
    assert not exported.has_cache
    found = perplexity(exported, IDS, sequence_length=64)
    expected = perplexity(model, IDS, sequence_length=64).negative_log_likelihood
    assert found.negative_log_likelihood == pytest.approx(expected, abs=1e-5)


class Encoder:
    """An exported graph that is no language model."""

    path = Path("model.onnx")
    has_cache = False

    def __init__(self, *inputs: str) -> None:
        self.inputs = inputs

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": inputs["input_ids"].float()}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (("input_ids", "attention_mask"), "gave no logits"),
        (("input_ids", "pixel_values"), "model.onnx also takes pixel_values"),
    ],
)
def test_refuses_an_onnx_file_that_cannot_be_scored(inputs: tuple[str, ...], reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        perplexity(Encoder(*inputs), IDS, sequence_length=64)


def test_a_compiled_model(model: LlamaForCausalLM) -> None:
    compiled = compile_sparse(model, [PruneMagnitude("2:4"), ApplyMasks()])
    of_program = perplexity(compiled, IDS, sequence_length=64, batch_size=2)
    of_model = perplexity(model, IDS, sequence_length=64)
    assert of_program.negative_log_likelihood == pytest.approx(
        of_model.negative_log_likelihood, abs=1e-5
    )


def test_the_mode_of_the_model_is_put_back(model: LlamaForCausalLM) -> None:
    model.train()
    perplexity(model, IDS, sequence_length=64)
    assert model.training


def test_half_precision_is_summed_in_double(model: LlamaForCausalLM) -> None:
    exact = perplexity(model, IDS, sequence_length=64).negative_log_likelihood
    half = perplexity(model.bfloat16(), IDS, sequence_length=64).negative_log_likelihood
    assert half == pytest.approx(exact, rel=1e-3)


def test_str_states_everything(model: LlamaForCausalLM) -> None:
    result = perplexity(model, IDS, sequence_length=64, stride=32)
    for part in (f"{result.perplexity:.4f}", "300 tokens", "64", "32", f"{result.seconds:.1f} s"):
        assert part in str(result)


def test_a_hopeless_model_is_infinitely_perplexed(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, IDS, sequence_length=64).perplexity == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(model: LlamaForCausalLM, value: float) -> None:
    model.lm_head.weight.data[7] = value
    with pytest.raises(EvaluationError, match="loss of token 1 is nan"):
        perplexity(model, IDS, sequence_length=64)


def test_windows_longer_than_the_model(model: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match="128 positions"):
        perplexity(model, IDS, sequence_length=129)
    assert perplexity(model, IDS[:100], sequence_length=1024).tokens == 99


def test_tokens_beyond_the_vocabulary(model: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match=r"0 to 256, but the model knows 256"):
        perplexity(model, [0, 256, 3], sequence_length=64)


@pytest.mark.parametrize("text", ["", " \n", "a"])
def test_too_little_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    with pytest.raises(EvaluationError, match=r"empty|at least two"):
        perplexity(model, text, tokenizer=tokenizer, sequence_length=64)


@pytest.mark.parametrize("ids", [torch.rand(5), torch.zeros(2, 5, dtype=torch.int64)])
def test_ids_that_are_none(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with pytest.raises(EvaluationError, match="integers in one dimension"):
        perplexity(model, ids, sequence_length=64)


@pytest.mark.parametrize(
    "options", [{"stride": 0}, {"stride": 65}, {"batch_size": 0}, {"max_tokens": 0}]
)
def test_options_out_of_range(model: LlamaForCausalLM, options: dict[str, int]) -> None:
    with pytest.raises(EvaluationError):
        perplexity(model, IDS, sequence_length=64, **options)


def test_a_text_without_a_tokenizer(model: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match="needs a tokenizer"):
        perplexity(model, "some text")
