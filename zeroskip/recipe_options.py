"""The options of a dataclass as plain data: read by its field types, strictly, and written back."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from zeroskip.ir.errors import RecipeError
from zeroskip.ir.patterns import SparsityPattern

_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short"}
AS_A_LIST = "Give the passes to compile_sparse as a list instead."


def options_of(cls: type[Any]) -> dict[str, tuple[Field[Any], Any]]:
    """The options of a pass: field name -> (field, type of the value in a recipe)."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: (field, _written(hints[field.name])) for field in fields(cls) if field.init}


def is_required(field: Field[Any]) -> bool:
    """Whether an option has to be given."""
    return field.default is MISSING and field.default_factory is MISSING


def pattern_options(cls: type[Any]) -> list[str]:
    """The options of a pass that are sparsity patterns."""
    hints = get_type_hints(cls)
    return [name for name in options_of(cls) if SparsityPattern in _members(hints[name])]


def section_of(hint: Any) -> type[Any] | None:
    """The dataclass that an option is, or may be; None where it is a plain value."""
    return next((m for m in _members(hint) if isinstance(m, type) and is_dataclass(m)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _written(hint: Any) -> Any:
    """The type of an option in a recipe: a pattern, or what may be a string or a path, is a string."""
    if isinstance(hint, type) and issubclass(hint, SparsityPattern):
        return str
    if get_origin(hint) in (Union, UnionType):
        members = [_written(member) for member in get_args(hint)]
        return reduce(or_, (m for m in members if not (m is Path and str in members)))
    return hint


def read_options(
    cls: type[Any], given: Mapping[Any, object], where: str, pass_name: str | None
) -> dict[str, Any]:
    """Checks `given` against the fields of a dataclass; returns the keyword arguments for it."""
    known = options_of(cls)
    for key in given:
        check_known(key, known, "option", where, pass_name)
    for name, (field, _) in known.items():
        if is_required(field) and name not in given:
            raise RecipeError(
                f"The option `{name}` is missing, and it has no default.",
                where=where,
                pass_name=pass_name,
            )
    read = {}
    for key, value in given.items():
        hint = known[key][1]
        section = section_of(hint)
        if section is None:
            read[key] = read_value(hint, value, key, where, pass_name)
        elif value is not None or type(None) not in _members(hint):
            read[key] = read_section(section, value, key, where)
    return read


def read_section(cls: type[Any], value: object, name: str, where: str) -> Any:
    """Reads a dataclass within a recipe: a mapping, or the one value that `shorthand` names."""
    shorthand: str | None = getattr(cls, "shorthand", None)
    if isinstance(value, Mapping):
        place = f"{where}, {name}"
        options = read_options(cls, value, place, None)
    elif shorthand is None or value is None or isinstance(value, list):
        alone = " or a single value" if shorthand else ""
        raise RecipeError(
            f"`{name}` must be a mapping of options{alone}, not {kind_of(value)}.", where=where
        )
    else:
        place = where
        options = {shorthand: read_value(options_of(cls)[shorthand][1], value, name, where, None)}
    try:
        return cls(**options)
    except RecipeError as error:
        error.where = error.where or place
        raise


def read_value(hint: Any, value: object, name: str, where: str, pass_name: str | None) -> Any:
    """Reads one value as the type `hint`, by the rules of strict JSON: a list may be a tuple."""
    try:
        return adapter_of(hint).validate_json(json.dumps(value), strict=True)
    except PydanticSchemaGenerationError as error:
        problem = f"The option `{name}` cannot be written in a recipe: its type is {hint}."
        raise RecipeError(problem, where=where, pass_name=pass_name) from error
    except (ValidationError, TypeError) as error:
        if isinstance(error, ValidationError) and any(
            detail["type"] == "needs_python_object" for detail in error.errors()
        ):
            raise RecipeError(
                f"The option `{name}` holds objects, and a recipe can only hold text and numbers.",
                where=f"{where}, option {name}",
                pass_name=pass_name,
                next_step=AS_A_LIST,
            ) from error
        reasons = (
            sorted({detail["msg"].replace("array", "list") for detail in error.errors()})
            if isinstance(error, ValidationError)
            else [str(error)]
        )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        quote = number and any("string" in reason for reason in reasons)
        kinds = {e["type"] for e in error.errors()} if isinstance(error, ValidationError) else set()
        wrong = "is out of range" if kinds and kinds <= _OF_RANGE else "has the wrong type"
        raise RecipeError(
            f"`{name}: {value}` {wrong}: {'; '.join(reasons)}.",
            where=f"{where}, option {name}",
            pass_name=pass_name,
            next_step=f'Put the value in quotes: `{name}: "{value}"`.' if quote else None,
        ) from error


@functools.cache
def adapter_of(hint: Any) -> TypeAdapter[Any]:
    """What reads, and describes, values of a type; made once, for it takes milliseconds."""
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def check_known(
    name: object, known: Collection[str], kind: str, where: str, pass_name: str | None = None
) -> None:
    """Raises when a name does not exist, offering the nearest one that does."""
    if isinstance(name, str) and name in known:
        return
    nearest = nearest_of(str(name), known)
    choices = ", ".join(f"`{each}`" for each in sorted(known)) or "none"
    raise RecipeError(
        f"Unknown {kind} `{name}`.",
        where=where,
        pass_name=pass_name,
        next_step=f"Did you mean `{nearest}`?" if nearest else f"There are: {choices}.",
    )


def nearest_of(name: str, known: Collection[str]) -> str | None:
    """Returns the known name that a name resembles most, with `-` or `_`; None where none does."""
    found = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    found = found or difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return found[0] if found else None


def plain(value: object) -> Any:
    """An option's value as YAML data; a pattern is written the way it is read.

    Raises:
        TypeError: YAML has no word for it.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, SparsityPattern):
        return str(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    raise TypeError(f"a recipe cannot express a {type(value).__name__}")


def kind_of(value: object) -> str:
    if value == []:
        return "an empty list"
    names = {dict: "a mapping", list: "a list", str: "a string", type(None): "nothing"}
    return names.get(type(value), f"`{value}`")
