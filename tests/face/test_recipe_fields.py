"""What a recipe says once for all passes, its budget, and what the command line puts into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroskip.ir.errors import RecipeError
from zeroskip.recipe import (
    Recipe,
    dump_recipe,
    load_recipe,
    loads_recipe,
    recipe_for,
    without_folders,
)
from zeroskip.recipe_overrides import overridden

FILE = """\
pattern: "2:4"
targets: ["*.mlp.*"]
ignore: ["*.0.*"]
seed: 7
passes:
  - observe
  - allocate-sparsity: {sparsity: 40%}
  - prune-wanda: {pattern: 60%, exclude: []}
  - prune-ria
  - apply-masks
  - reconstruct-blocks: {seed: 3}
  - distill-outputs
"""


def test_what_is_said_once_is_in_every_pass_that_does_not_say_it() -> None:
    recipe = loads_recipe(FILE)
    observe, allocate, wanda, ria, _, blocks, distill = recipe.passes
    assert (observe.include, observe.exclude) == (("*.mlp.*",), ("*.0.*",))
    assert (wanda.pattern, wanda.include, wanda.exclude) == ("0.6", ("*.mlp.*",), ())
    assert (ria.pattern, allocate.sparsity) == ("2:4", "0.4")
    assert (blocks.seed, distill.seed, recipe.calibration.seed) == (3, 7, 7)
    assert loads_recipe(dump_recipe(recipe)) == recipe
    assert loads_recipe(dump_recipe(recipe, defaults=True)) == recipe


def test_a_pattern_from_outside_takes_the_place_of_the_recipes_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FILE, encoding="utf-8")
    assert [load_recipe(path, "4:8").passes[n].pattern for n in (2, 3)] == ["0.6", "4:8"]
    path.write_text("passes: [observe, prune-wanda: {pattern: 50%}, apply-masks]")
    with pytest.raises(RecipeError, match="no pass takes it"):
        load_recipe(path, "4:8")


def test_a_seed_of_the_calibration_is_its_own() -> None:
    recipe = loads_recipe("seed: 7\ncalibration: {seed: 1}\npasses: [observe, reconstruct-blocks]")
    assert (recipe.calibration.seed, recipe.passes[1].seed) == (1, 7)


@pytest.mark.parametrize("budget", ["budget: {memory: 1GiB}", "budget: 1GiB", "memory: 1GiB"])
def test_one_budget_in_three_spellings(budget: str) -> None:
    assert loads_recipe(f"passes: [observe]\n{budget}").memory == "1GiB"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pattern: 2:4", "no pass takes it"),
        ("targets: ['*']\npasses: [apply-masks]", "no pass takes it"),
        ("pattern: half\npasses: [prune-wanda]", "not a sparsity pattern"),
        ("seed: -1", "out of range"),
        ("targets: '*.mlp'", "wrong type"),
        ("budget: {memory: plenty}", "is not a size"),
        ("budget: {memory: 1GiB, disk: 2GiB}", "Unknown option `disk`"),
        ("budget: 1GiB\nmemory: 1GiB", "say the same"),
        ("budget: [1GiB]", "must be a mapping of options or a single value"),
        ("calibration: {text: 3}", "wrong type"),
        ("gates: {max_byte: 3}", "Unknown option `max_byte`"),
        ("gates: {max_bytes: 3 apples}", "is not a size"),
        ("gates: {max_perplexity_increase: 1.1}", "says not what it means"),
        ("gates: {max_perplexity_increase: 0x}", "can never hold"),
        ("gates: {max_perplexity_increase: {text: t}}", "`limit` is missing"),
        ("gates: {min_speedup: fast}", "not a number above 0"),
        ("gates: {min_speedup: {limit: 2, tokens: []}}", "out of range"),
        ("gates: {min_speedup: {limit: 2, tokens: [0]}}", "out of range"),
        ("gates: {parity: 0}", "out of range"),
        ("gates: {parity: [1]}", "must be a mapping"),
        ("gates: 3", "must be a mapping"),
    ],
)
def test_refusals(line: str, message: str) -> None:
    text = line if "passes" in line else f"passes: [observe]\n{line}"
    with pytest.raises(RecipeError) as caught:
        loads_recipe(text)
    assert message in caught.value.problem


def test_the_units_of_an_increase() -> None:
    for text in ("5%", "1.05x", "5 %"):
        gates = loads_recipe(f"passes: [observe]\ngates: {{max_perplexity_increase: {text}}}").gates
        assert gates.max_perplexity_increase is not None
        assert gates.max_perplexity_increase.ratio == pytest.approx(1.05)
    for text in ("1.2", "1.2x", '"1.2"'):
        gates = loads_recipe(f"passes: [observe]\ngates: {{min_speedup: {text}}}").gates
        assert gates.min_speedup is not None
        assert gates.min_speedup.factor == 1.2


def test_texts_are_found_from_wherever_a_recipe_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/r.yaml").write_text(
        "passes: [observe]\ncalibration: {text: a.txt}\n"
        "gates: {max_perplexity_increase: {limit: 5%, text: /data/b.txt}}\n"
    )
    recipe = load_recipe("recipes/r.yaml")
    assert recipe.calibration.text == "recipes/a.txt"
    assert recipe.gates.max_perplexity_increase is not None
    assert recipe.gates.max_perplexity_increase.text == "/data/b.txt"
    Path("deep/out").mkdir(parents=True)
    Path("deep/out/recipe.yaml").write_text(dump_recipe(recipe_for(recipe, Path("deep/out"))))
    again = load_recipe("deep/out/recipe.yaml")
    assert Path(str(again.calibration.text)).resolve() == tmp_path / "recipes/a.txt"
    assert without_folders(again) == without_folders(recipe)


def test_the_command_line_comes_last() -> None:
    recipe = loads_recipe(
        "passes: [observe]\ngates: {min_speedup: {limit: 2, tokens: [1]}, max_bytes: 1MiB}"
    )
    made = overridden(
        recipe,
        samples=3,
        calibration=Path("a.txt"),
        memory="1GiB",
        gates=["min-speedup=1.5x", "max_bytes=null", "max_perplexity_increase={limit: 5%}"],
        evaluation=Path("b.txt"),
    )
    assert (made.calibration.samples, made.calibration.text, made.memory) == (3, "a.txt", "1GiB")
    assert made.gates.max_bytes is None
    assert made.gates.min_speedup is not None
    assert (made.gates.min_speedup.factor, made.gates.min_speedup.tokens) == (1.5, (1,))
    assert made.gates.max_perplexity_increase is not None
    assert made.gates.max_perplexity_increase.text == "b.txt"
    assert overridden(recipe) == recipe
    assert loads_recipe(dump_recipe(made)) == made


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (["min_sped=2"], "Unknown gate `min_sped`"),
        (["min_speedup"], "has no value"),
        (["min_speedup=[2]"], "must be a mapping"),
        (["max_bytes={"], "not YAML"),
        ([], "no gate that measures on a text"),
    ],
)
def test_gates_that_the_command_line_cannot_set(gates: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(
            Recipe(loads_recipe("passes: [observe]").passes), gates=gates, evaluation=Path("b.txt")
        )
    assert message in caught.value.problem
