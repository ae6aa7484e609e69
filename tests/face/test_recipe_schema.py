"""The JSON Schema of recipes: what it takes the reader takes, and what it refuses is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from zeroskip.ir.errors import CompileError
from zeroskip.passes import PASSES
from zeroskip.presets import PRESETS, preset, preset_text
from zeroskip.recipe import dump_recipe, loads_recipe
from zeroskip.recipe_schema import recipe_schema
from zeroskip.recipe_yaml import RecipeLoader

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("recipes/*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_every_option_of_every_pass_is_described(validator: Any) -> None:
    for name in PASSES:
        body = validator.schema["$defs"][name]["properties"][name]
        options = next((each for each in body.get("anyOf", [body]) if "properties" in each), body)
        undescribed = [
            key for key, each in options["properties"].items() if not each["description"]
        ]
        assert undescribed == [], name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_recipes_are_valid(validator: Any, path: Path) -> None:
    validator.validate(yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(validator: Any, name: str) -> None:
    full = dump_recipe(preset(name, "2:4"), defaults=True)
    for text in (preset_text(name, "2:4"), full):
        validator.validate(yaml.load(text, Loader=RecipeLoader))


SOUND = [
    "passes: [observe, {prune-wanda: }, apply-masks]",
    "passes: [prune-wanda]\npattern: 2:4\nseed: 3\ntargets: ['*']\nbudget: 2GiB",
    "passes: [prune-wanda]\nbudget: {memory: 512 MB}\ncalibration: {text: a.txt}",
    """
    passes: [export-onnx: {directory: onnx, external_data_threshold: 4096}]
    gates: {max_bytes: 80MiB, parity: 1e-5, min_speedup: {limit: 1.2x, tokens: [1, 128]}}
    """,
    "passes: [observe]\ngates: {max_perplexity_increase: 5%, min_speedup: null}",
]
WRONG = [
    "passes: []",
    "passes: observe",
    "memory: 4GiB",
    "pases: [observe]",
    "passes: [obsrve]",
    "passes: [export-onnx]",
    "passes: [export-onnx: {directory: 3}]",
    "passes: [observe: {gram: 1}]",
    "passes: [observe: {windows: 3}]",
    "passes: [{observe: , apply-masks: }]",
    "passes: [prune-wanda: {pattern: half}]",
    "passes: [prune-wanda: {pattern: 0.5}]",
    "passes: [allocate-sparsity: {method: best}]",
    "passes: [fold-scales: {scales: {a: [1.0]}}]",
    "passes: [prune-wanda]\npattern: half",
    "passes: [observe]\ncalibration: {samples: 0}",
    "passes: [observe]\ncalibration: {sample: 3}",
    "passes: [observe]\nbudget: 4 apples",
    "passes: [observe]\nbudget: 4GiB\nmemory: 4GiB",
    "passes: [observe]\ntargets: '*'",
    "passes: [observe]\nseed: -1",
    "passes: [observe]\ngates: {max_perplexity_increase: 1.1}",
    "passes: [observe]\ngates: {max_bytes: big}",
    "passes: [observe]\ngates: {min_speedup: {limit: 2, tokens: []}}",
    "passes: [observe]\ngates: {parity: 0}",
]


@pytest.mark.parametrize("text", SOUND)
def test_both_take_what_is_sound(validator: Any, text: str) -> None:
    validator.validate(yaml.load(text, Loader=RecipeLoader))
    loads_recipe(text)


@pytest.mark.parametrize("text", WRONG)
def test_both_refuse_what_is_wrong(validator: Any, text: str) -> None:
    assert not validator.is_valid(yaml.load(text, Loader=RecipeLoader))
    with pytest.raises(CompileError):
        loads_recipe(text)
