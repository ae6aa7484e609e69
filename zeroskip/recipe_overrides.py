"""A recipe with what the command line says in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from zeroskip.gate_options import Gates
from zeroskip.ir.errors import RecipeError
from zeroskip.recipe import Recipe
from zeroskip.recipe_document import Budget
from zeroskip.recipe_options import check_known, options_of, read_section, section_of
from zeroskip.recipe_yaml import RecipeLoader


def overridden(
    recipe: Recipe,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    calibration: Path | None = None,
    memory: str | None = None,
    gates: Sequence[str] = (),
    evaluation: Path | None = None,
) -> Recipe:
    """Returns a recipe in which everything that is given takes the place of what was there.

    Args:
        recipe: As it was read.
        samples: Of the calibration.
        sequence_length: Of the calibration.
        seed: Of the calibration.
        calibration: The text to calibrate on.
        memory: Of the budget.
        gates: Each `NAME=VALUE`; the value as a recipe has it. Of a gate that is there, a plain
            value changes the limit alone, and `null` removes it.
        evaluation: The text of the gate on perplexity.

    Raises:
        RecipeError: A gate or a value is none, or there is no gate on perplexity.
    """
    given: dict[str, Any] = {
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "text": None if calibration is None else str(calibration),
    }
    changed = {name: value for name, value in given.items() if value is not None}
    budget = Budget(recipe.memory if memory is None else memory)
    recipe = replace(
        recipe,
        calibration=replace(recipe.calibration, **changed),
        memory=budget.memory,
        gates=_with_gates(recipe.gates, gates),
    )
    if evaluation is None:
        return recipe
    gate = recipe.gates.max_perplexity_increase
    if gate is None:
        raise RecipeError(
            "there is no gate that measures on a text.",
            where="--evaluation",
            next_step="add --gate max_perplexity_increase=5%, or leave --evaluation out",
        )
    gate = replace(gate, text=str(evaluation))
    return replace(recipe, gates=replace(recipe.gates, max_perplexity_increase=gate))


def _with_gates(gates: Gates, given: Sequence[str]) -> Gates:
    for text in given:
        where = f"--gate {text}"
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        check_known(name, [each.name for each in fields(Gates)], "gate", where)
        if not equals:
            raise RecipeError(
                f"the gate `{name}` has no value.", where=where, next_step=f"write {name}=VALUE"
            )
        try:
            read = yaml.load(value, Loader=RecipeLoader)
        except yaml.YAMLError as error:
            raise RecipeError(f"the value is not YAML: {error}.", where=where) from error
        section = section_of(options_of(Gates)[name][1])
        assert section is not None
        known = getattr(gates, name)
        made = None if read is None else read_section(section, read, name, where)
        if made is not None and known is not None and not isinstance(read, dict):
            made = section(**{**asdict(known), section.shorthand: getattr(made, section.shorthand)})
        gates = replace(gates, **{name: made})
    return gates
