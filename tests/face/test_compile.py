"""compile_sparse: what comes back, what the user's model holds afterwards, and bad calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.small import Residual, small_model
from tests.zoo import GROUPED, ZOO
from zeroskip import CompiledModel, compile_sparse
from zeroskip.ir.errors import ArtifactError, CalibrationError, CaptureError, CompileError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.program import Program
from zeroskip.passes import ApplyMasks, LowerMasked, Observe, Pass, PruneMagnitude, PruneWanda

WANDA: list[Pass] = [Observe(), PruneWanda("2:4"), ApplyMasks()]
MAGNITUDE: list[Pass] = [PruneMagnitude("2:4"), ApplyMasks()]
BATCH = ZOO["llama"].inputs(2, 12)
LAYER = "model.layers.0.mlp.down_proj.weight"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def is_two_of_four(weight: Tensor) -> bool:
    return bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


@dataclass(frozen=True)
class Fails(Pass):
    name = "fails"

    def run(self, program: Program) -> Program:
        raise CompileError("planted")


def test_a_live_model_and_its_checkpoint_give_the_same_bits(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    live = compile_sparse(model, WANDA, calibration=[BATCH])
    stored = compile_sparse(tmp_path / "dense", WANDA, calibration=[BATCH])
    assert stored.model is None
    assert live.model is model
    assert set(live.program.weights) == set(stored.program.weights)
    for name in live.program.weights:
        assert torch.equal(live.program.weights[name], stored.program.weights[name]), name
    assert torch.equal(live(**BATCH)["logits"], stored(**BATCH)["logits"])
    live.save_pretrained(tmp_path / "live")
    stored.save_pretrained(tmp_path / "stored")
    loaded = [
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("live", "stored")
    ]
    assert_equal(state(loaded[0]), state(loaded[1]))
    assert_equal(state(loaded[0]), state(model))
    config = json.loads((tmp_path / "live" / "config.json").read_text())
    assert not [key for key in config if "spars" in key or "quant" in key]


def test_the_users_model_holds_the_weights_and_generates() -> None:
    model = small_model("llama")
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    compiled = compile_sparse(model, [*WANDA, LowerMasked()], calibration=[BATCH])
    assert compiled.model is model
    assert is_two_of_four(model.get_parameter(LAYER))
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert all(value.requires_grad for value in model.parameters())
    for name in compiled.program.weights:
        assert torch.equal(compiled.program.weights[name], model.get_parameter(name)), name
    with torch.no_grad():
        torch.testing.assert_close(compiled(**BATCH)["logits"], model(**BATCH).logits)
    tokens = model.generate(**BATCH, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert tokens.shape == (2, 15)
    assert model.config.use_cache is True


def test_a_taken_folder_is_not_overwritten(tmp_path: Path) -> None:
    compiled = compile_sparse(small_model("llama"), MAGNITUDE)
    (tmp_path / "precious").write_text("")
    with pytest.raises(ArtifactError) as caught:
        compiled.save_pretrained(tmp_path)
    assert caught.value.next_step
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_a_failure_at_the_end_leaves_the_model_untouched() -> None:
    model = small_model("llama")
    before = state(model)
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    with pytest.raises(CompileError, match="planted") as caught:
        compile_sparse(model, [*WANDA, Fails()], calibration=[BATCH])
    assert caught.value.pass_name == "fails"
    assert_equal(state(model), before)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == pointers
    assert not model.training
    assert model.config.use_cache is True


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1, "tie_word_embeddings": True})
    model = hf.LlamaForCausalLM(config).eval()
    head = ("model.embed_tokens.weight",)
    steps: list[Pass] = [*MAGNITUDE, PruneMagnitude("2:4", include=head), ApplyMasks()]
    compiled = compile_sparse(model, steps)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    assert embedding.weight is output.weight
    assert is_two_of_four(embedding.weight)
    compiled.save_pretrained(tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert_equal(state(again), state(model))


def test_a_plain_module() -> None:
    model = small_model("mlp")
    batch = {"features": torch.randn(4, 5, 16)}
    compiled = compile_sparse(model, WANDA, calibration=[batch])
    assert isinstance(model, Residual)
    assert model.again.weight is model.up.weight
    assert is_two_of_four(model.up.weight)
    (output,) = compiled(**batch).values()
    with torch.no_grad():
        torch.testing.assert_close(output, model(**batch))
    with pytest.raises(CompileError, match="not a Hugging Face model") as caught:
        compiled.save_pretrained("nowhere")
    assert caught.value.next_step
    assert not Path("nowhere").exists()


@pytest.fixture(scope="module")
def report_of_llama() -> CompiledModel:
    return compile_sparse(small_model("llama"), [*WANDA, LowerMasked()], calibration=[BATCH])


def test_the_report_as_text(report_of_llama: CompiledModel) -> None:
    text = str(report_of_llama.report)
    lines = text.splitlines()
    assert lines[0].split() == ["pass", "parts", "seconds", "modified", "drift"]
    names = ["observe", "prune-wanda", "apply-masks", "lower-masked"]
    assert [line.split()[0] for line in lines[2:6]] == names
    assert all(line.split()[3] == "yes" for line in lines[2:6])
    row = next(line.split() for line in lines if line.startswith(LAYER))
    assert row == [LAYER, "64", "x", "112", "2:4", "0.5000", "zeroskip::masked_linear"]
    head = next(line for line in lines if line.startswith("lm_head.weight"))
    assert "dense" in head
    assert head.endswith("output head")
    assert "output drift" in lines[-1]


def test_the_report_as_json(report_of_llama: CompiledModel) -> None:
    document = json.loads(json.dumps(report_of_llama.report.to_json()))
    records = {record["name"]: record for record in document["passes"]}
    assert list(records) == ["observe", "prune-wanda", "apply-masks", "lower-masked"]
    for record in records.values():
        assert record["seconds"] > 0
        assert record["modified"] is True
    assert records["observe"]["drift"] is None
    assert records["apply-masks"]["drift"] > 0.01
    assert records["lower-masked"]["drift"] <= 1e-5
    assert records["prune-wanda"]["options"]["pattern"] == "2:4"
    linears = {linear["name"]: linear for linear in document["linears"]}
    assert linears[LAYER]["shape"] == [64, 112]
    assert linears[LAYER]["pattern"] == "2:4"
    assert linears[LAYER]["density"] == 0.5
    assert linears["lm_head.weight"]["density"] == 1.0
    assert document["density"] == 0.5
    assert document["drift"] > 0.01
    assert document["seconds"] > 0


def shallow_model(name: str) -> nn.Module:
    """A model of the zoo with one layer."""
    if name == "llama":
        return small_model("llama")
    one = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "vit": {"num_hidden_layers": 1}}
    model = ZOO[name].model()
    config = type(model.config)(**{**model.config.to_dict(), **one[name]})  # type: ignore[operator]
    return type(model)(config).eval()


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_example_inputs_are_made_up(name: str) -> None:
    compiled = compile_sparse(shallow_model(name), MAGNITUDE)
    inputs = {
        "llama": ("input_ids", "attention_mask"),
        "vit": ("pixel_values",),
        "t5": ("input_ids", "attention_mask", "decoder_input_ids"),
    }
    assert compiled.program.inputs == inputs[name]
    assert compiled.report.density == 0.5
    assert set(compiled(**ZOO[name].inputs(3, 7))) == set(compiled.program.outputs)


def test_example_inputs_cannot_be_made_up_for_a_plain_module() -> None:
    with pytest.raises(CaptureError, match="does not tell what inputs") as caught:
        compile_sparse(small_model("mlp"), MAGNITUDE)
    assert caught.value.where == "Residual"
    assert "example_inputs=" in str(caught.value.next_step)


def test_bfloat16(tmp_path: Path) -> None:
    model = small_model("llama").to(torch.bfloat16)
    before = state(model)
    compiled = compile_sparse(model, WANDA, calibration=[BATCH])
    weight = model.get_parameter(LAYER)
    assert weight.dtype == torch.bfloat16
    assert is_two_of_four(weight)
    keep = compiled.program.fact(SparseWeights).masks[LAYER].keep()
    assert torch.equal(weight, before[LAYER].masked_fill(~keep, 0))
    compiled.save_pretrained(tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert_equal(state(again), state(model))


def test_tensors_of_ids_are_batches() -> None:
    first, second = small_model("gpt2"), small_model("gpt2")
    ids = BATCH["input_ids"]
    compile_sparse(first, WANDA, calibration=[ids], example_inputs={"input_ids": ids})
    compile_sparse(second, WANDA, calibration=iter([{"input_ids": ids}]))
    assert_equal(state(first), state(second))


IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
# What is passed as calibration, and what the message names.
BAD: dict[str, tuple[Any, str]] = {
    "empty list": ([], "no calibration data"),
    "nothing": (None, "no calibration data"),
    "text": ("some text", "calibration is a str"),
    "one batch": (dict(BATCH), "calibration is a dict"),
    "one tensor": (IDS, "calibration is a Tensor"),
    "batch of text": (["some text"], "batch 0 is a str"),
    "second batch is a number": ([BATCH, 3], "batch 1 is a int"),
    "float ids": ([{**BATCH, "input_ids": IDS.float()}], "batch 0, input_ids"),
    "beyond the vocabulary": ([BATCH, {**BATCH, "input_ids": IDS + 160}], "batch 1, input_ids"),
    "negative ids": ([{**BATCH, "input_ids": IDS - 100}], "token id -"),
    "missing key": ([{"input_ids": IDS}], "missing ['attention_mask']"),
    "unknown key": ([{**BATCH, "labels": IDS}], "unknown ['labels']"),
    "empty batch": ([BATCH, {k: v[:0] for k, v in BATCH.items()}], "batch 1, input_ids"),
    "empty mapping": ([BATCH, {}], "missing ['input_ids', 'attention_mask']"),
    "no tokens": ([BATCH, {k: v[:, :0] for k, v in BATCH.items()}], "batch 1, input_ids"),
    "one dimension": ([BATCH, {k: v[0] for k, v in BATCH.items()}], "batch 1, input_ids"),
    "different batch sizes": (
        [BATCH, {"input_ids": IDS, "attention_mask": MASK[:1]}],
        "different batch sizes: {'input_ids': 2, 'attention_mask': 1}",
    ),
    "all padding": ([{**BATCH, "attention_mask": MASK * 0}], "0 tokens that are not padding"),
    "a list of ids": ([BATCH, {**BATCH, "input_ids": IDS.tolist()}], "batch 1, input_ids"),
    "a first list of ids": ([{**BATCH, "input_ids": IDS.tolist()}], "batch 0, input_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_is_refused(name: str) -> None:
    calibration, message = BAD[name]
    model = small_model("llama")
    before = state(model)
    with pytest.raises(CalibrationError) as caught:
        compile_sparse(model, WANDA, calibration=calibration, example_inputs=BATCH)
    assert message in str(caught.value)
    assert caught.value.next_step
    assert_equal(state(model), before)


@pytest.mark.parametrize(
    "name", ["float ids", "beyond the vocabulary", "negative ids", "all padding", "one dimension"]
)
def test_bad_calibration_without_example_inputs_is_a_compile_error(name: str) -> None:
    calibration, _ = BAD[name]
    with pytest.raises(CompileError) as caught:
        compile_sparse(small_model("llama"), WANDA, calibration=calibration)
    assert caught.value.next_step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(value: float) -> None:
    entry = ZOO["convnet"]
    good, bad = entry.inputs(2), entry.inputs(2)
    bad["pixel_values"][1, 2, 3, 4] = value
    with pytest.raises(CalibrationError, match="NaN or inf") as caught:
        compile_sparse(entry.model(), WANDA, example_inputs=good, calibration=[good, bad])
    assert caught.value.where == "batch 1, pixel_values"
    assert caught.value.next_step


def test_training_mode_is_refused() -> None:
    model = small_model("llama").train()
    with pytest.raises(CaptureError, match="training mode") as caught:
        compile_sparse(model, MAGNITUDE)
    assert "eval()" in str(caught.value.next_step)
    assert model.training


@pytest.mark.parametrize("model", [3, None, {"a": 1}])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(
        CaptureError, match=f"a {type(model).__name__} cannot be compiled"
    ) as caught:
        compile_sparse(model, MAGNITUDE)
    assert caught.value.next_step


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        compile_sparse(tmp_path / "nothing", MAGNITUDE)
    assert "nothing" in str(caught.value)
    assert caught.value.next_step
