"""A recipe: a list of passes and what goes with it, written as YAML or JSON.

```yaml
pattern: "2:4"
passes:
  - observe
  - prune-wanda
  - apply-masks
calibration: {samples: 32, sequence_length: 512, seed: 0}
budget: {memory: 4GiB}
gates: {max_bytes: 80MiB}
```

The options of a pass are the fields of its dataclass, so nothing is declared twice: a recipe is
checked against the types of those fields, strictly (`"3"` is not a number, `1` is not a flag). What
is written once for all passes (`pattern`, `targets`, `ignore`, `seed`) is put into each of them on
reading: a `Recipe` holds passes with all their options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zeroskip.gate_options import Gates
from zeroskip.ir.errors import CompileError, PatternError, RecipeError
from zeroskip.ir.patterns import parse_pattern
from zeroskip.passes import PASSES
from zeroskip.recipe_document import MEMORY, Budget, CalibrationOptions, RecipeDocument
from zeroskip.recipe_options import (
    AS_A_LIST,
    check_known,
    kind_of,
    options_of,
    plain,
    read_options,
    section_of,
)
from zeroskip.recipe_shorthand import Shorthand
from zeroskip.recipe_yaml import RecipeDumper, RecipeLoader

if TYPE_CHECKING:
    from zeroskip.passes.base import Pass


@dataclass(frozen=True)
class Recipe:
    """What to run, on what calibration text, within how much memory, and what has to come out.

    Args:
        passes: In order, every option set.
        calibration: Its `text` is a path that holds from the working directory.
        memory: Budget for activations.
        gates: Their texts are such paths as well.
    """

    passes: tuple[Pass, ...]
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    memory: str = MEMORY
    gates: Gates = field(default_factory=Gates)


def load_recipe(path: str | Path, pattern: str | None = None) -> Recipe:
    """Reads a recipe file: JSON when it ends in `.json`, YAML otherwise.

    Args:
        path: Texts that the recipe names are relative to its folder.
        pattern: Takes the place of the recipe's own `pattern`.

    Raises:
        RecipeError: The file is missing or malformed, or names what does not exist; or no pass
            takes the pattern.
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
    as_json = path.suffix == ".json"
    recipe = loads_recipe(text, where=str(path), as_json=as_json, pattern=pattern)
    return _with_texts(recipe, lambda text: str(path.parent / text))


def loads_recipe(
    text: str, *, where: str = "recipe", as_json: bool = False, pattern: str | None = None
) -> Recipe:
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
    except RecursionError as error:
        raise RecipeError("The recipe is nested too deep.", where=where) from error
    # Scalars with a tag that they do not fit: PyYAML lets the errors of int() and others through.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise RecipeError(f"The recipe holds a malformed value: {error}.", where=where) from error
    return parse_recipe(document, where=where, pattern=pattern)


def parse_recipe(document: object, *, where: str = "recipe", pattern: str | None = None) -> Recipe:
    """Turns the plain data of a recipe (dicts, lists, strings, numbers) into a `Recipe`."""
    if not isinstance(document, Mapping):
        raise RecipeError(
            f"A recipe is a mapping with the key `passes`, not {kind_of(document)}.", where=where
        )
    for key in document:
        check_known(key, options_of(RecipeDocument), "top-level key", where)
    entries = document.get("passes")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(
            f"`passes` must be a list of at least one pass, not {kind_of(entries)}.",
            where=where,
            next_step="Write `passes:` followed by one `- name` or `- name: {option: value}` a line.",
        )
    if "memory" in document and "budget" in document:
        raise RecipeError(
            "`memory` and `budget` are both there, and say the same.",
            where=where,
            next_step="Leave `memory` out.",
        )
    # The passes are read below, where a shorthand can be put into them.
    top = RecipeDocument(**read_options(RecipeDocument, {**document, "passes": []}, where, None))
    _check_pattern(top.pattern, f"{where}, option pattern")
    _check_pattern(pattern, "--pattern")
    shorthand = Shorthand(pattern or top.pattern, top.targets, top.ignore, top.seed)
    passes = [_pass(entry, f"{where}, passes[{i}]", shorthand) for i, entry in enumerate(entries)]
    shorthand.check_used(where)
    calibration = top.calibration
    own = document.get("calibration")
    if top.seed is not None and not (isinstance(own, Mapping) and "seed" in own):
        calibration = replace(calibration, seed=top.seed)
    budget = top.budget
    if top.memory is not None:
        budget = Budget(top.memory)
    return Recipe(tuple(passes), calibration, budget.memory, top.gates)


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
    sections = {
        "calibration": recipe.calibration,
        "budget": Budget(recipe.memory),
        "gates": recipe.gates,
    }
    for name, section in sections.items():
        if written := _written(section, defaults):
            document[name] = written
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


def recipe_for(recipe: Recipe, folder: Path) -> Recipe:
    """Returns the recipe as it is to be written into a folder: relative texts lead there from it."""
    return _with_texts(
        recipe,
        lambda text: (
            text if Path(text).is_absolute() else Path(os.path.relpath(text, folder)).as_posix()
        ),
    )


def without_folders(recipe: Recipe) -> Recipe:
    """Returns the recipe with the bare names of its texts: what it does, wherever they are."""
    return _with_texts(recipe, lambda text: Path(text).name)


def _with_texts(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    calibration, gate = recipe.calibration, recipe.gates.max_perplexity_increase
    if calibration.text is not None:
        recipe = replace(recipe, calibration=replace(calibration, text=change(calibration.text)))
    if gate is not None and gate.text is not None:
        gate = replace(gate, text=change(gate.text))
        recipe = replace(recipe, gates=replace(recipe.gates, max_perplexity_increase=gate))
    return recipe


def _written(section: Any, defaults: bool) -> dict[str, Any]:
    """A dataclass as a mapping, by default only with what is not as by default."""
    written: dict[str, Any] = {}
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            inner = _written(value, defaults)
            alone = getattr(value, "shorthand", None)
            short = alone is not None and not defaults and list(inner) == [alone]
            written[each.name] = inner[str(alone)] if short else inner
        elif value != each.default or (defaults and not _is_section(section, each.name)):
            written[each.name] = plain(value)
    return written


def _is_section(section: Any, name: str) -> bool:
    return section_of(options_of(type(section))[name][1]) is not None


def _check_pattern(pattern: str | None, where: str) -> None:
    try:
        if pattern is not None:
            parse_pattern(pattern)
    except PatternError as error:
        raise RecipeError(f"{error.problem}.", where=where, next_step=error.next_step) from error


def _pass(entry: object, where: str, shorthand: Shorthand) -> Pass:
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
    options = read_options(cls, shorthand.fill(cls, given), where, name)
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
    for name, (option, _) in options_of(type(step)).items():
        value = getattr(step, name)
        default = option.default
        if option.default_factory is not MISSING:
            default = option.default_factory()
        if defaults or default is MISSING or value != default:
            try:
                options[name] = plain(value)
            except TypeError as error:
                raise RecipeError(
                    f"The option `{name}`: {error}.", pass_name=step.name, next_step=AS_A_LIST
                ) from error
    return {step.name: options} if options else step.name
