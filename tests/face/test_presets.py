"""Presets: recipes by name, at any pattern, which run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import small_model
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.errors import PatternError, RecipeError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.presets import PRESETS, about, find_recipe, preset, preset_text
from zeroskip.recipe import dump_recipe, loads_recipe


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_a_preset_prunes_what_it_says(name: str, pattern: str) -> None:
    recipe = preset(name, pattern)
    batches = [ZOO["llama"].inputs(2, 15 + n) for n in range(3)]
    compiled = compile_sparse(small_model("llama"), recipe.passes, calibration=batches)
    masks = compiled.program.fact(SparseWeights).masks
    assert len(masks) == 7
    for linear in find_linears(compiled.program):
        if linear.name in masks:
            weight = linear.weight(compiled.program)
            assert int((weight != 0).sum()) * 2 == weight.numel()
            assert masks[linear.name].pattern == parse_pattern(pattern)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_recipe_like_any_other(name: str) -> None:
    recipe = preset(name, "4:8")
    assert loads_recipe(dump_recipe(recipe)) == recipe
    assert "4:8" in dump_recipe(recipe)
    assert loads_recipe(preset_text(name, "4:8")) == recipe
    assert about(name).endswith(".")


def test_a_name_is_a_preset_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("fast", "2:4") == preset("fast", "2:4")
    assert find_recipe("best") == preset("best", "50%")
    Path("fast").write_text("passes: [eliminate-dead-code]")
    assert [step.name for step in find_recipe("fast").passes] == ["eliminate-dead-code"]
    with pytest.raises(RecipeError, match="no pass takes it"):
        find_recipe("fast", "2:4")


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="Unknown preset `fats`") as caught:
        preset("fats")
    assert "fast" in str(caught.value.next_step)
    with pytest.raises(PatternError, match="not a sparsity pattern"):
        preset("best", "half")
    with pytest.raises(RecipeError, match="neither a file nor a preset"):
        find_recipe("far from any")
    with pytest.raises(RecipeError, match="Did you mean `best`"):
        find_recipe("bst")
    with pytest.raises(RecipeError, match="cannot be read"):
        find_recipe("bets.yaml")


def test_better_presets_see_more_data() -> None:
    seen = [preset(name).calibration for name in ("fast", "balanced", "best")]
    tokens = [options.samples * options.sequence_length for options in seen]
    assert tokens == sorted(tokens)
