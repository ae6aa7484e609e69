"""lower-sparse-linear: every spelling, every value type, what decides, and what stays dense."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.test_lower_masked import SPELLINGS, Spelled
from tests.small import small_model, small_program
from zeroskip import compile_sparse
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import RecipeError
from zeroskip.ir.facts import Lowered, SparseWeights
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.ir.linears import find_linears
from zeroskip.ir.packing import packed_names
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.passes import (
    ApplyMasks,
    LowerSparseLinear,
    Pass,
    PassManager,
    PruneMagnitude,
    QuantizeValues,
)
from zeroskip.passes.base import measure_drift
from zeroskip.passes.lower_sparse_linear import lower_alike
from zeroskip.recipe import loads_recipe
from zeroskip.runtime import dispatch, tuning_cache
from zeroskip.runtime.rivals import ONNX_RUNTIME, Rival

ALWAYS = LowerSparseLinear(choose="always")
OPERATOR = "zeroskip::sparse_linear"


def prune(program: Program, *steps: Pass, pattern: str = "2:4") -> Program:
    return PassManager([PruneMagnitude(pattern), ApplyMasks(), *steps])(program).program


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_lowered(name: str) -> None:
    shape, rank, operator, product = SPELLINGS[name]
    x = torch.randn(*(3, 5)[: rank - 1], 16, generator=torch.Generator().manual_seed(1))
    pruned = prune(capture(Spelled(shape, product).eval(), {"x": x}))
    lowered = ALWAYS(pruned).program
    text = print_program(lowered)
    assert text.count("zeroskip.sparse_linear(x, ") == 1
    assert operator not in text.replace("sparse_linear(", "")
    assert lowered.level == "lowered"
    assert lowered.fact(Lowered).operators == {"weight": OPERATOR}
    (linear,) = find_linears(lowered)
    assert (linear.name, linear.shape) == ("weight", (8, 16))
    assert torch.equal(linear.weight(lowered), find_linears(pruned)[0].weight(pruned))
    torch.testing.assert_close(lowered.run({"x": x}), pruned.run({"x": x}))


@pytest.mark.parametrize("model", ["mlp", "llama", "gpt2", "moe"])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_a_lowered_model_computes_the_same(model: str, values: Any) -> None:
    steps: list[Pass] = [] if values == "float32" else [QuantizeValues(values, 0, "float32")]
    pruned = prune(small_program(model), *steps, pattern="50%")
    result = ALWAYS(pruned)
    assert result.drift is not None
    assert result.drift < 1e-5
    lowered = result.program
    # Packed tensors are made when they are read: one run loads them, the dense ones are not read.
    assert not set(lowered.read_weights()) & set(lowered.fact(Lowered).operators)
    stored = {lowered.weights.source(n).dtype for n in packed_names(lowered)}
    assert getattr(torch, values) in stored


def test_int8_activations_are_a_recorded_loss() -> None:
    pruned = prune(small_program("llama"), QuantizeValues("int8"))
    result = ALWAYS(pruned)
    assert result.drift is not None
    assert 1e-4 < result.drift < 0.05
    assert ALWAYS.is_lossy(pruned)
    assert not ALWAYS.is_lossy(prune(small_program("llama")))


def test_half_precision_models_are_packed_without_loss() -> None:
    model = small_model("llama").bfloat16()
    program = capture(model, small_program("llama").example_inputs)
    pruned = prune(program)
    result = ALWAYS(pruned)
    assert result.drift is not None
    assert result.drift < 2e-2
    packed = packed_names(result.program)
    stored = {
        name: result.program.weights.source(name).dtype for name in packed if "values" in name
    }
    assert set(stored.values()) == {torch.bfloat16}


def test_a_shared_weight_is_packed_once() -> None:
    text = print_program(ALWAYS(prune(small_program("mlp"))).program)
    assert text.count("@up.weight_values, None, @up.bias") == 1
    assert text.count("@up.weight_values, None, @again.bias") == 1


def test_refusals_say_why() -> None:
    program = small_program("moe")
    fact = ALWAYS(prune(program)).program.fact(Lowered)
    prefix = "model.layers.0"
    assert fact.operators == {f"{prefix}.self_attn.{n}_proj.weight": OPERATOR for n in "qkvo"}
    assert fact.refusals["lm_head.weight"] == "it is not pruned"
    experts = {fact.refusals[n] for n in fact.refusals if "experts" in n}
    assert experts == {"its weight is 3-D, one matrix for each expert"}
    assert set(fact.operators) | set(fact.refusals) == {n.name for n in find_linears(program)}


def test_double_precision_stays() -> None:
    program = capture(small_model("mlp").double(), {"features": torch.randn(2, 5, 16).double()})
    fact = ALWAYS(prune(program)).program.fact(Lowered)
    assert not fact.operators
    assert "kernels compute in float32" in fact.refusals["up.weight"]


def test_names_choose() -> None:
    pruned = prune(small_program("mlp"))
    only = LowerSparseLinear(choose="always", include=("up",))(pruned).program.fact(Lowered)
    assert set(only.operators) == {"up.weight"}
    assert only.refusals["down.weight"] == "it is excluded"
    rest = LowerSparseLinear(choose="always", exclude=("up",))(pruned).program.fact(Lowered)
    assert set(rest.operators) == {"down.weight"}


def test_a_second_pass_takes_what_the_first_left() -> None:
    pruned = prune(small_program("mlp"))
    first = LowerSparseLinear(choose="always", include=("up",))(pruned).program
    second = ALWAYS(first).program
    assert set(second.fact(Lowered).operators) == {"up.weight", "down.weight"}
    assert measure_drift(pruned, second) < 1e-5


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, str]], list[dict[str, Any]]]:
    """Makes `judge` answer by the number of rows of the weight; returns what it was asked."""

    def plant(choices: dict[int, str]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def judge(weight: BitmaskWeight, **options: Any) -> dispatch.Verdict:
            asked.append(options)
            choice: Any = choices[weight.rows]
            return dispatch.Verdict(
                rows=weight.rows,
                columns=weight.columns,
                density=0.5,
                value_type="float32",
                accuracy_level=options["accuracy_level"],
                dense_bytes=4 * weight.rows * weight.columns,
                packed_bytes=weight.nbytes,
                layout=1,
                speedup=dict.fromkeys(options["m_values"], 1.25 if choice == "sparse" else 0.5),
                choice=choice,
                reason=f"{choice} was planted",
                source="measured",
            )

        monkeypatch.setattr(dispatch, "judge", judge)
        return asked

    return plant


def test_the_verdict_decides_for_each_linear(
    verdicts: Callable[[dict[int, str]], list[dict[str, Any]]],
) -> None:
    asked = verdicts({24: "sparse", 16: "dense"})
    pruned = prune(small_program("mlp"))
    program = LowerSparseLinear(m=(1, 7), choose="measure", threads=1)(pruned).program
    fact = program.fact(Lowered)
    assert fact.operators == {"up.weight": OPERATOR}
    assert fact.refusals == {"down.weight": "dense was planted"}
    assert fact.verdicts["up.weight"]["speedup"] == {"1": 1.25, "7": 1.25}
    assert fact.verdicts["down.weight"]["choice"] == "dense"
    (node,) = {u.node for n in find_linears(program) if n.name == "up.weight" for u in n.uses[:1]}
    assert node.args[9] == 1, "the layout of the verdict"
    assert len(asked) == 2
    assert asked[0]["m_values"] == (1, 7)
    assert (asked[0]["source"], asked[0]["threads"], asked[0]["layouts"]) == ("measure", 1, (0, 1))
    assert asked[0]["working_set_bytes"] == 4 * 2 * 24 * 16


def test_nothing_pays_means_nothing_changes(
    verdicts: Callable[[dict[int, str]], list[dict[str, Any]]],
) -> None:
    verdicts({24: "dense", 16: "dense"})
    pruned = prune(small_program("mlp"))
    result = LowerSparseLinear()(pruned)
    assert result.program.level == "captured"
    assert result.drift is None


def test_stored_layout_is_asked_for(
    verdicts: Callable[[dict[int, str]], list[dict[str, Any]]],
) -> None:
    asked = verdicts({24: "sparse", 16: "sparse"})
    LowerSparseLinear(layout="stored")(prune(small_program("mlp")))
    assert asked[0]["layouts"] == (0,)
    assert asked[0]["source"] == "table"


def test_onnx_runtime_is_the_rival_unless_pytorch_is_the_target(
    verdicts: Callable[[dict[int, str]], list[dict[str, Any]]],
) -> None:
    asked = verdicts({24: "sparse", 16: "dense"})
    half = capture(small_model("mlp").bfloat16(), {"features": torch.randn(2, 5, 16).bfloat16()})
    for program, dtype in ((small_program("mlp"), torch.float32), (half, torch.bfloat16)):
        LowerSparseLinear()(prune(program))
        assert asked[-1]["rival"] == ONNX_RUNTIME
        assert asked[-1]["working_set_bytes"] == 4 * 2 * 24 * 16
        LowerSparseLinear(target="torch-cpu")(prune(program))
        assert asked[-1]["rival"] == Rival("PyTorch", dtype)
        assert asked[-1]["working_set_bytes"] == dtype.itemsize * 2 * 24 * 16


def test_against_pytorch_nothing_is_lowered_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_cache, "tuning_file", lambda: tmp_path / "tuning.json")
    program = capture(nn.Sequential(nn.Linear(512, 384)).eval(), {"input": torch.randn(3, 512)})
    pruned = prune(program, pattern="90%")
    unmeasured = LowerSparseLinear(m=(1,), target="torch-cpu")(pruned).program.fact(Lowered)
    assert not unmeasured.operators
    assert "never measured against PyTorch" in unmeasured.refusals["0.weight"]
    measured = LowerSparseLinear(m=(1,), choose="measure", threads=1, target="torch-cpu")(pruned)
    (verdict,) = measured.program.fact(Lowered).verdicts.values()
    assert (verdict["rival"], verdict["source"]) == ("PyTorch", "measured")
    (speedup,) = verdict["speedup"].values()  # type: ignore[attr-defined]
    if verdict["choice"] == "sparse":
        assert speedup >= 0.97
    assert measure_drift(pruned, measured.program) < 1e-5


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("torch-cup", "did you mean torch-cpu?"),
        ("onnxruntime", "did you mean onnxruntime-cpu?"),
        ("torch", "did you mean torch-cpu?"),
        ("tensorrt", "use onnxruntime-cpu or torch-cpu"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest(target: str, advice: str) -> None:
    with pytest.raises(RecipeError, match="is no choice") as caught:
        LowerSparseLinear(target=target)
    assert caught.value.next_step == advice
    with pytest.raises(RecipeError) as caught:
        loads_recipe(f"passes: [lower-sparse-linear: {{target: {target}}}]")
    assert caught.value.next_step == advice


@pytest.mark.parametrize(
    "options",
    [{"m": ()}, {"m": (0,)}, {"choose": "fast"}, {"layout": "best"}, {"threads": -1}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="is no choice"):
        LowerSparseLinear(**options)


def test_a_tiny_linear_is_not_made_slower() -> None:
    """Without planted verdicts: what the table says of 24 x 16 is to leave it alone, or faster."""
    program = LowerSparseLinear()(prune(small_program("mlp"))).program
    for verdict in program.fact(Lowered).verdicts.values():
        if verdict["choice"] == "sparse":
            assert min(verdict["speedup"].values()) >= 0.97  # type: ignore[attr-defined]


def test_another_capture_is_lowered_alike() -> None:
    pruned = prune(small_program("llama"), QuantizeValues("int8"), pattern="50%")
    lowered = LowerSparseLinear(choose="always", exclude=("*q_proj*",), layout="throughput")(pruned)
    again = lower_alike(lowered.program, pruned)
    assert print_program(again).count("sparse_linear") == 6
    assert measure_drift(lowered.program, again) == 0
    sources = {n: lowered.program.weights.source(n) for n in packed_names(lowered.program)}
    assert {n: again.weights.source(n) for n in packed_names(again)} == sources


def test_checkpoints_hold_the_dense_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model("llama")
    compiled = compile_sparse(
        model,
        [PruneMagnitude("2:4"), ApplyMasks(), ALWAYS],
        example_inputs=small_program("llama").example_inputs,
    )
    compiled.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    inputs = small_program("llama").example_inputs
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(compiled(**inputs)["logits"], expected, atol=1e-4, rtol=1e-3)


def test_calls_load_packed_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroskip.ir.formats import PackedValues

    loads = 0
    load = PackedValues.load

    def counted(self: PackedValues) -> Tensor:
        nonlocal loads
        loads += 1
        return load(self)

    monkeypatch.setattr(PackedValues, "load", counted)
    x = {"features": small_program("mlp").example_inputs["features"]}
    steps = [PruneMagnitude("2:4"), ApplyMasks(), ALWAYS]
    compiled = compile_sparse(small_model("mlp"), steps, example_inputs=x)
    compiled(**x)
    before = loads
    compiled(**x)
    assert loads == before


def test_kernels_forget_a_weight_that_is_gone() -> None:
    from zeroskip.runtime.kernels import sparse_linear as kernels

    pruned = prune(capture(nn.Sequential(nn.Linear(64, 32)).eval(), {"input": torch.randn(3, 64)}))
    lowered = ALWAYS(pruned).program.loaded()
    gc.collect()
    before = len(kernels._ready)
    lowered.run({"input": torch.randn(3, 64)})
    remembered = len(kernels._ready)
    lowered.run({"input": torch.randn(3, 64)})
    assert len(kernels._ready) == remembered
    if kernels.try_library_path() is not None:
        assert remembered == before + 1
    del lowered
    gc.collect()
    assert len(kernels._ready) == before


def test_a_stage_of_a_lowered_program_is_whole() -> None:
    """A packed linear stands for a parameter that no node reads: its stage must own it as well."""
    lowered = prune(small_program("llama"), ALWAYS)
    fact = lowered.fact(SparseWeights)
    again = PassManager([PruneMagnitude("2:4")])(lowered)
    assert again.program.fact(SparseWeights).masks.keys() == fact.masks.keys()
