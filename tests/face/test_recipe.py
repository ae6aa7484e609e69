from __future__ import annotations

import json
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml

from zeroskip.ir.errors import RecipeError
from zeroskip.pass_list import describe_passes
from zeroskip.passes import PASSES, FoldScales
from zeroskip.recipe import (
    CalibrationOptions,
    Recipe,
    dump_recipe,
    load_recipe,
    loads_recipe,
    parse_recipe,
)
from zeroskip.recipe_options import options_of

REQUIRED = {"pattern": "2:4", "directory": "some/where"}
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """A pass with its required options given."""
    options = {
        option: REQUIRED[option]
        for option, (field, _) in options_of(PASSES[name]).items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    return PASSES[name](**options)


def variants(name: str) -> list[Any]:
    """The pass, and the pass with each flag and each choice changed."""
    base = example(name)
    found = [base]
    for option, (_, hint) in options_of(PASSES[name]).items():
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if hint is bool:
            choices = (not getattr(base, option),)
        found += [replace(base, **{option: choice}) for choice in choices]
    return found


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("defaults", [False, True])
def test_every_pass_comes_back_equal(name: str, defaults: bool) -> None:
    for step in variants(name):
        text = dump_recipe([step], defaults=defaults)
        assert loads_recipe(text).passes == (step,)
        as_json = json.dumps(yaml.safe_load(text))
        assert loads_recipe(as_json, as_json=True).passes == (step,)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_can_be_listed(name: str) -> None:
    described = next(each for each in describe_passes() if each["name"] == name)
    assert described["summary"]
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "0.5", "block:16x16:0.5"])
def test_patterns_come_back_equal(pattern: str) -> None:
    step = PASSES["prune-wanda"](pattern)
    assert loads_recipe(dump_recipe([step])).passes == (step,)


def test_the_whole_recipe_comes_back() -> None:
    recipe = Recipe((example("observe"),), CalibrationOptions(7, 64, 3), "512MiB")
    assert loads_recipe(dump_recipe(recipe)) == recipe
    assert loads_recipe(dump_recipe(recipe, defaults=True)) == recipe


def test_defaults_are_left_out_unless_asked_for() -> None:
    assert yaml.safe_load(dump_recipe([example("observe")])) == {"passes": ["observe"]}
    spelled_out = yaml.safe_load(dump_recipe([example("observe")], defaults=True))
    assert set(spelled_out) == {"passes", "calibration", "budget"}


def test_an_unquoted_pattern_is_no_number() -> None:
    quoted = loads_recipe('passes: [prune-wanda: {pattern: "2:4"}]')
    assert loads_recipe("passes: [prune-wanda: {pattern: 2:4}]") == quoted
    assert loads_recipe("passes:\n  - prune-wanda:\n      pattern: 2:4\n") == quoted


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").iterdir()), ids=lambda p: p.name)
def test_the_example_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).passes


@pytest.mark.parametrize(
    ("text", "message", "advice"),
    [
        ("passes: [obsrve]", "Unknown pass `obsrve`", "`observe`"),
        ("passes: [PruneWanda]", "Unknown pass `PruneWanda`", "prune-wanda"),
        ("passes: [apply_masks]", "Unknown pass `apply_masks`", "`apply-masks`"),
        ("passes: [3]", "A pass is", None),
        ("passes: [observe: 3]", "options of a pass are a mapping", None),
        ("passes: [{observe: , apply-masks: }]", "A pass is", None),
        ("passes: [observe: {windows: 3}]", "Unknown option `windows`", None),
        ("passes: [prune-wanda: {patern: 50%}]", "Unknown option `patern`", "`pattern`"),
        ("passes: [export-onnx]", "`directory` is missing", None),
        ("passes: [prune-wanda: {pattern: [2, 4]}]", "wrong type", None),
        ("passes: [prune-wanda: {pattern: 5:4}]", "5:4", None),
        ("passes: [export-onnx: {directory: 3}]", "wrong type", "in quotes"),
        ("pases: [observe]", "Unknown top-level key `pases`", "`passes`"),
        ("passes: []", "at least one pass, not an empty list", None),
        ("passes: observe", "at least one pass, not a string", None),
        ("memory: 4GiB", "at least one pass, not nothing", None),
        ("- observe", "mapping with the key `passes`, not a list", None),
        ("", "mapping with the key `passes`, not nothing", None),
        ("passes: [observe]\nmemory: 4", "wrong type", "in quotes"),
        ("passes: [observe]\ncalibration: 3", "`calibration` must be a mapping", None),
        ("passes: [observe]\ncalibration: {sample: 3}", "option `sample`", "`samples`"),
        ("passes: [observe]\ncalibration: {samples: many}", "wrong type", None),
        ("passes: [observe]\ncalibration: {samples: 1.5}", "wrong type", None),
        ("passes: [observe]\ncalibration: {samples: true}", "wrong type", None),
        ("passes: [observe]\ncalibration: {samples: 0}", "greater than or equal to 1", None),
        ("passes: [observe]\ncalibration: {seed: -1}", "out of range", None),
    ],
)
def test_refusals_name_the_place_and_the_nearest(
    tmp_path: Path, text: str, message: str, advice: str | None
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in caught.value.problem
    assert str(path) in (caught.value.where or "")
    if advice:
        assert advice in (caught.value.next_step or "")


def test_a_wrong_value_names_pass_and_option() -> None:
    with pytest.raises(RecipeError) as caught:
        loads_recipe("passes: [observe, prune-wanda: {pattern: 0.5}]", where="r.yaml")
    assert caught.value.pass_name == "prune-wanda"
    assert caught.value.where == "r.yaml, passes[1], option pattern"
    assert caught.value.next_step == 'Put the value in quotes: `pattern: "0.5"`.'


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("r.yaml", "passes:\n  - observe\n  - [", "line 3"),
        ("r.yaml", "passes: [observe]\npasses: [observe]\n", "line 2"),
        ("r.yaml", "passes: [observe: {a: 1,\n a: 2}]", "line 2"),
        ("r.yaml", "passes: [!!python/object:os.system x]", "line 1"),
        ("r.json", '{"passes":\n ["observe",]}', "line 2"),
    ],
)
def test_malformed_text_names_the_line(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert place in (caught.value.where or "")


@pytest.mark.parametrize("content", [None, b"passes: [\xff]", b"passes: [\x01]"])
def test_files_that_are_no_text(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in (caught.value.where or "")


def test_a_pass_that_is_not_in_the_table_cannot_be_written() -> None:
    class Own(type(example("observe"))):  # type: ignore[misc]
        """Somebody's own pass."""

    with pytest.raises(RecipeError, match=r"not in zeroskip\.passes\.PASSES"):
        dump_recipe([Own()])


def test_plain_data_is_a_recipe_too() -> None:
    assert parse_recipe({"passes": ["observe"]}).passes == (example("observe"),)


def test_tensors_cannot_be_in_a_recipe() -> None:
    step = FoldScales(scales={"a -> b": torch.ones(3)})
    with pytest.raises(RecipeError, match="cannot express a Tensor") as caught:
        dump_recipe([step])
    assert "as a list" in str(caught.value.next_step)
    with pytest.raises(RecipeError, match="`scales` holds objects") as caught:
        loads_recipe("passes: [fold-scales: {scales: {a -> b: [1.0, 2.0]}}]")
    assert caught.value.pass_name == "fold-scales"
    assert "as a list" in str(caught.value.next_step)
