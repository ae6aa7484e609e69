"""quantize-values: what is rounded, how the scales are chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.small import small_program
from zeroskip.ir.errors import CompileError, LoweringError, RecipeError
from zeroskip.ir.facts import QuantizedValues, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.passes import (
    ApplyMasks,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    QuantizeValues,
)
from zeroskip.passes.quantize_values import choose_scales


def compiled(name: str, *steps: Pass, pattern: str = "50%") -> Program:
    return PassManager([PruneMagnitude(pattern), ApplyMasks(), *steps])(small_program(name)).program


@pytest.mark.parametrize("model", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_are_rounded_to_nearest(model: str, dtype: str) -> None:
    before, after = compiled(model), compiled(model, QuantizeValues(dtype))  # type: ignore[arg-type]
    for linear in find_linears(after):
        old, new = linear.weight(before), linear.weight(after)
        if linear.name in after.fact(SparseWeights).masks:
            assert torch.equal(new, old.to(getattr(torch, dtype)).to(old.dtype)), linear.name
            assert not torch.equal(new, old)
        else:
            assert torch.equal(new, old), linear.name


@pytest.mark.parametrize("model", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("block_size", [0, 64])
def test_int8_weights_are_whole_multiples_of_their_scale(model: str, block_size: int) -> None:
    before = compiled(model)
    after = compiled(model, QuantizeValues("int8", block_size))
    formats = after.fact(QuantizedValues).formats
    assert formats
    linears = {linear.name: linear for linear in find_linears(after)}
    for name, form in formats.items():
        old, new = linears[name].weight(before), linears[name].weight(after)
        assert form.scales is not None
        width = block_size or old.shape[1]
        steps = form.scales.repeat_interleave(width, 1)[:, : old.shape[1]]
        q = new / steps
        assert torch.allclose(q, q.round(), atol=1e-4)
        assert q.abs().max() <= 127.001
        assert float((new - old).norm() / old.norm()) < 0.01
        assert torch.equal(new == 0, (old == 0) | (new == 0))  # zeros stay


def test_a_second_run_changes_nothing() -> None:
    once = compiled("mlp", QuantizeValues("bfloat16"))
    assert not QuantizeValues("bfloat16")(once).modified


def weighted_error(weight: torch.Tensor, scales: torch.Tensor, share: torch.Tensor) -> float:
    q = (weight / scales).round().clamp(-127, 127)
    return float(((weight - q * scales).square() * share).sum())


def test_scales_weigh_inputs_by_how_much_passes_through_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 96, generator=generator)
    weight[:, 5] *= 8  # An outlier channel that hardly ever carries anything ...
    share = torch.ones(96)
    share[5] = 1e-4
    largest = weight.abs().amax(1, keepdim=True) / 127
    plain, informed = choose_scales(weight), choose_scales(weight, share)
    # ... should not cost all others their resolution, and no choice is worse than the largest's.
    assert weighted_error(weight, informed, share) < weighted_error(weight, largest, share)
    assert weighted_error(weight, informed, share) <= weighted_error(weight, plain, share)
    ones = torch.ones(96)
    assert weighted_error(weight, plain, ones) <= weighted_error(weight, largest, ones)


def test_scales_of_extreme_rows() -> None:
    weight = torch.zeros(4, 64)
    weight[1, 3] = 1e-42  # subnormal
    weight[2, :] = 3e38
    weight[3, 7] = -5.0
    scales = choose_scales(weight)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert float(scales[3]) == pytest.approx(5 / 127, rel=0.25)
    assert torch.equal(scales, choose_scales(weight, torch.zeros(64)))


def test_statistics_reach_the_scales() -> None:
    program = small_program("mlp")
    steps = [PruneMagnitude("50%"), ApplyMasks(), Observe(), QuantizeValues("int8")]
    informed = PassManager(steps)(program).program.fact(QuantizedValues).formats
    plain = compiled("mlp", QuantizeValues("int8")).fact(QuantizedValues).formats
    assert any(not torch.equal(informed[n].scales, plain[n].scales) for n in plain)


def test_experts_and_dense_linears_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = compiled("moe")
    after = compiled("moe", QuantizeValues("int8"))
    formats = after.fact(QuantizedValues).formats
    assert formats
    assert not any("experts" in name or "lm_head" in name for name in formats)
    for linear in find_linears(after):
        if linear.name not in formats:
            assert torch.equal(linear.weight(after), linear.weight(before)), linear.name


def test_names_choose() -> None:
    chosen = compiled("mlp", QuantizeValues("bfloat16", include=("up",)))
    assert set(chosen.fact(QuantizedValues).formats) == {"up.weight"}
    rest = compiled("mlp", QuantizeValues("bfloat16", exclude=("up",)))
    assert set(rest.fact(QuantizedValues).formats) == {"down.weight"}


def test_drift_is_recorded() -> None:
    steps = [PruneMagnitude("50%"), ApplyMasks(), QuantizeValues("int8")]
    records = PassManager(steps)(small_program("mlp")).records
    assert records[-1].drift is not None
    assert 0 < records[-1].drift < 0.05


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="int4"):
        QuantizeValues("int4")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no scales"):
        QuantizeValues("bfloat16", 64)
    with pytest.raises(RecipeError, match="activations"):
        QuantizeValues("int8", activations="int4")  # type: ignore[arg-type]
    with pytest.raises(LoweringError, match="multiple of 64"):
        QuantizeValues("int8", 48)


def test_weights_that_do_not_fit_are_refused() -> None:
    program = compiled("mlp")
    large = program.with_weights({"up.weight": program.weights["up.weight"] * 1e7})
    with pytest.raises(CompileError, match="does not fit into float16") as caught:
        QuantizeValues("float16")(large)
    assert caught.value.where == "up.weight"
    assert caught.value.pass_name == "quantize-values"
    assert QuantizeValues("bfloat16")(large).modified
