"""A recipe: a list of passes, written as YAML or JSON.

```yaml
passes:
  - observe
  - prune-wanda: {pattern: "2:4"}
  - apply-masks
calibration: {samples: 32, sequence_length: 512, seed: 0}
memory: 4GiB
```

The options of a pass are the fields of its dataclass, so nothing is declared twice: a recipe is
checked against the types of those fields, strictly (`"3"` is not a number, `1` is not a flag).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.patterns import parse_pattern
from zeroskip.passes import PASSES
from zeroskip.recipe_options import (
    AS_A_LIST,
    check_known,
    kind_of,
    options_of,
    plain,
    read_options,
    read_value,
)
from zeroskip.recipe_yaml import RecipeDumper, RecipeLoader

if TYPE_CHECKING:
    from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class CalibrationOptions:
    """How many windows of text a compilation sees, how long they are, and which ones."""

    samples: int = 32
    sequence_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """What to run, on how much calibration text, within how much memory."""

    passes: tuple[Pass, ...]
    calibration: CalibrationOptions = CalibrationOptions()
    memory: str = "4GiB"


# {pattern} is what to prune to. Read them with `preset`, or copy one and change it.
PRESETS = {
    # One pass over the calibration data; no weight changes but to zero.
    "fast": """
        passes:
          - observe
          - prune-wanda: {pattern: "{pattern}"}
          - apply-masks
        calibration: {samples: 32, sequence_length: 512}
    """,
    # The kept weights make up for the pruned ones, linear by linear, then layer by layer.
    "balanced": """
        passes:
          - observe: {gram: true}
          - prune-sparsegpt: {pattern: "{pattern}"}
          - reconstruct-blocks
        calibration: {samples: 32, sequence_length: 512}
    """,
    # The same on four times the data.
    "best": """
        passes:
          - observe: {gram: true}
          - prune-sparsegpt: {pattern: "{pattern}"}
          - reconstruct-blocks: {epochs: 2}
        calibration: {samples: 64, sequence_length: 1024}
    """,
}


def preset(name: str, pattern: str = "50%") -> Recipe:
    """Returns a recipe by name: `fast`, `balanced` or `best`.

    Args:
        name: A key of `PRESETS`.
        pattern: What to prune to, such as `2:4` or `50%`.

    Raises:
        RecipeError: There is no such preset, or the text is not a pattern.
    """
    check_known(name, PRESETS, "preset", "presets")
    text = textwrap.dedent(PRESETS[name]).replace("{pattern}", str(parse_pattern(pattern)))
    return loads_recipe(text, where=f"preset {name}")


def find_recipe(name: str, pattern: str | None = None) -> Recipe:
    """Returns the recipe of a file, or a preset by its name.

    Args:
        name: A path, or a key of `PRESETS`; a file of that name comes first.
        pattern: For a preset only.

    Raises:
        RecipeError: There is neither, or a pattern was given for a file.
    """
    if name in PRESETS and not Path(name).exists():
        return preset(name, pattern or "50%")
    if pattern is not None:
        raise RecipeError(
            "a recipe file has its pattern inside.",
            where=name,
            next_step=f"write it there, or name a preset: {', '.join(PRESETS)}",
        )
    return load_recipe(name)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file: JSON when it ends in `.json`, YAML otherwise.

    Raises:
        RecipeError: The file is missing or malformed, or names what does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"The recipe cannot be read: {error}.",
            where=str(path),
            next_step="Give the path of a UTF-8 YAML or JSON file.",
        ) from error
    return loads_recipe(text, where=str(path), as_json=path.suffix == ".json")


def loads_recipe(text: str, *, where: str = "recipe", as_json: bool = False) -> Recipe:
    """Reads a recipe from its text; `where` names it in errors."""
    try:
        document = json.loads(text) if as_json else yaml.load(text, Loader=RecipeLoader)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"The recipe is not JSON: {error.msg}.",
            where=f"{where}, line {error.lineno}, column {error.colno}",
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(
            f"The recipe is not YAML: {error.problem}.", where=f"{where}{position}"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe is not YAML: {error}.", where=where) from error
    return parse_recipe(document, where=where)


def parse_recipe(document: object, *, where: str = "recipe") -> Recipe:
    """Turns the plain data of a recipe (dicts, lists, strings, numbers) into a `Recipe`."""
    if not isinstance(document, Mapping):
        raise RecipeError(
            f"A recipe is a mapping with the key `passes`, not {kind_of(document)}.", where=where
        )
    for key in document:
        check_known(key, _RECIPE_KEYS, "top-level key", where)
    entries = document.get("passes")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(
            f"`passes` must be a list of at least one pass, not {kind_of(entries)}.",
            where=where,
            next_step="Write `passes:` followed by one `- name` or `- name: {option: value}` a line.",
        )
    calibration = document.get("calibration", {})
    if not isinstance(calibration, Mapping):
        raise RecipeError(
            f"`calibration` must be a mapping of options, not {kind_of(calibration)}.", where=where
        )
    options = read_options(CalibrationOptions, calibration, f"{where}, calibration", None)
    for name, value in options.items():
        if value < (0 if name == "seed" else 1):
            raise RecipeError(f"`{name}` is {value}: too small.", where=f"{where}, calibration")
    memory = read_value(str, document.get("memory", Recipe.memory), "memory", where, None)
    return Recipe(
        tuple(_pass(entry, f"{where}, passes[{i}]") for i, entry in enumerate(entries)),
        CalibrationOptions(**options),
        memory,
    )


def dump_recipe(recipe: Recipe | Iterable[Pass], *, defaults: bool = False) -> str:
    """Writes a recipe as YAML that reads back as an equal recipe.

    Args:
        recipe: A recipe, or only its passes.
        defaults: Whether options that hold their default value are written too, so that the text
            means the same under a version with other defaults.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(tuple(recipe))
    document: dict[str, Any] = {"passes": [_entry(step, defaults) for step in recipe.passes]}
    if defaults or recipe.calibration != CalibrationOptions():
        document["calibration"] = asdict(recipe.calibration)
    if defaults or recipe.memory != Recipe.memory:
        document["memory"] = recipe.memory
    text: str = yaml.dump(
        document, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100
    )
    for step, again in zip(recipe.passes, loads_recipe(text).passes, strict=True):
        if _entry(again, defaults=True) != _entry(step, defaults=True):
            raise RecipeError(
                f"{step} would come back from a recipe as {again}.",
                pass_name=step.name,
                next_step=AS_A_LIST,
            )
    return text


_RECIPE_KEYS = frozenset({"passes", "calibration", "memory"})


def _pass(entry: object, where: str) -> Pass:
    """One item of `passes`: a name, or a mapping from one name to its options."""
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(
            f"A pass is `name` or `name: {{option: value}}`, not {kind_of(entry)}.", where=where
        )
    name, given = next(iter(entry.items()))
    check_known(name, PASSES, "pass", where)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"The options of a pass are a mapping, not {kind_of(given)}.",
            where=where,
            pass_name=name,
        )
    cls = PASSES[name]
    options = read_options(cls, given, where, name)
    try:
        return cls(**options)
    except (CompileError, ValueError, TypeError) as error:
        problem = error.problem if isinstance(error, CompileError) else str(error)
        next_step = error.next_step if isinstance(error, CompileError) else None
        raise RecipeError(problem, where=where, pass_name=name, next_step=next_step) from error


def _entry(step: Pass, defaults: bool) -> str | dict[str, dict[str, Any]]:
    """One pass as an item of `passes`."""
    if PASSES.get(step.name) is not type(step):
        raise RecipeError(
            f"{type(step).__name__} is not in zeroskip.passes.PASSES, so no recipe can name it.",
            pass_name=step.name,
            next_step=AS_A_LIST,
        )
    options = {}
    for name, (field, _) in options_of(type(step)).items():
        value = getattr(step, name)
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if defaults or default is MISSING or value != default:
            try:
                options[name] = plain(value)
            except TypeError as error:
                raise RecipeError(
                    f"The option `{name}`: {error}.", pass_name=step.name, next_step=AS_A_LIST
                ) from error
    return {step.name: options} if options else step.name
