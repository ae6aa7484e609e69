"""The JSON Schema of recipes, made from the dataclasses that read them."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import PydanticInvalidForJsonSchema

from zeroskip.pass_docs import option_docs, pass_doc
from zeroskip.passes import PASSES
from zeroskip.recipe_document import RecipeDocument
from zeroskip.recipe_options import adapter_of, is_required, options_of, pattern_options, section_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What `parse_pattern` reads; it also checks the numbers.
_PATTERN = {
    "type": "string",
    "pattern": r"^\s*(\d+:\d+( pad)?|block:\d+x\d+:[0-9.]+(e-?\d+)?%?|[0-9.]+(e-?\d+)?%?( row| matrix| global)?)\s*$",
    "examples": ["2:4", "50%", "4:8 pad", "0.5 matrix", "block:16x16:0.5"],
}


def recipe_schema() -> dict[str, Any]:
    """Returns the schema of a recipe, draft 2020-12."""
    schema = _section(RecipeDocument)
    properties = schema["properties"]
    properties["pattern"] = {**properties["pattern"], "anyOf": [_PATTERN, {"type": "null"}]}
    properties["passes"] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_bare_names(), *({"$ref": f"#/$defs/{name}"} for name in PASSES)]},
        "description": properties["passes"]["description"],
    }
    return {
        "$schema": DIALECT,
        "title": "A recipe for zeroskip",
        **schema,
        "not": {"required": ["memory", "budget"]},
        "$defs": {name: _pass(name) for name in PASSES},
    }


def _bare_names() -> dict[str, Any]:
    """The passes that can stand without options."""
    return {
        "oneOf": [
            {"const": name, "description": pass_doc(cls).summary}
            for name, cls in PASSES.items()
            if not any(is_required(field) for field, _ in options_of(cls).values())
        ]
    }


def _pass(name: str) -> dict[str, Any]:
    """A pass with options: a mapping with its name alone."""
    cls = PASSES[name]
    options = _section(cls)
    for option in pattern_options(cls):
        options["properties"][option].update(_PATTERN)
    if not options.get("required"):
        options = {"anyOf": [options, {"type": "null"}]}
    summary = pass_doc(cls).summary
    return {
        "type": "object",
        "properties": {name: {**options, "description": summary}},
        "required": [name],
        "additionalProperties": False,
    }


def _section(cls: type[Any]) -> dict[str, Any]:
    """A dataclass as an object whose properties are its options."""
    texts = option_docs(cls)
    properties, required = {}, []
    for name, (field, hint) in options_of(cls).items():
        inner = section_of(hint)
        try:
            found = adapter_of(hint).json_schema() if inner is None else _short_or_long(inner)
        except PydanticInvalidForJsonSchema:
            continue  # Tensors: a recipe cannot hold them.
        if inner is not None and field.default is None:
            found = {"anyOf": [found, {"type": "null"}]}
        if is_required(field):
            required.append(name)
        elif inner is None:
            found["default"] = adapter_of(hint).dump_python(_default(field), mode="json")
        properties[name] = {**found, "description": texts.get(name, "")}
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _short_or_long(cls: type[Any]) -> dict[str, Any]:
    """A section as a mapping, or as the one value that stands for it."""
    long = _section(cls)
    long["description"] = (inspect.getdoc(cls) or "").partition("\n")[0]
    shorthand = getattr(cls, "shorthand", None)
    if shorthand is None:
        return long
    short = {k: v for k, v in long["properties"][shorthand].items() if k != "default"}
    return {"anyOf": [short, long]}


def _default(field: Any) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
