"""A page for every pass, from its docstring, its fields and a recipe in pass_recipes.yaml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from zeroskip.pass_docs import option_docs, pass_doc
from zeroskip.pass_list import describe_passes
from zeroskip.passes import PASSES, Pass
from zeroskip.recipe import loads_recipe

RECIPES = Path(__file__).with_name("pass_recipes.yaml")


class Group(NamedTuple):
    """Passes that belong together, and a recipe for each."""

    title: str
    text: str
    passes: dict[str, str]


def groups() -> list[Group]:
    """The groups that pass_recipes.yaml describes."""
    return [Group(**group) for group in yaml.safe_load(RECIPES.read_text(encoding="utf-8"))]


def pass_pages() -> dict[str, str]:
    """The path of every page under docs/, and its Markdown."""
    described = {each["name"]: each for each in describe_passes()}
    pages = {"passes/index.md": _index()}
    for group in groups():
        for name, recipe in group.passes.items():
            pages[f"passes/{name}.md"] = _page(name, recipe, described[name]["options"])
    return pages


def pass_navigation() -> list[Any]:
    """The part of the navigation that holds them."""
    return [
        "passes/index.md",
        *({g.title: [{name: f"passes/{name}.md"} for name in g.passes]} for g in groups()),
    ]


def _index() -> str:
    lines = [
        "# Passes",
        "",
        (
            "Each page comes from the docstring of the pass. The order in a recipe is yours and is "
            "never changed; a missing requirement is an error before anything runs. "
            "[Writing a pass](../writing-a-pass.md) adds one of your own."
        ),
    ]
    for group in groups():
        lines += ["", f"## {group.title}", "", group.text, ""]
        lines += ["| pass | what it does | needs | gives |", "|---|---|---|---|"]
        for name in group.passes:
            cls = PASSES[name]
            cells = [f"[`{name}`]({name}.md)", _one_line(pass_doc(cls).summary)]
            cells += [_facts(cls.requires), _facts(cls.provides)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _page(name: str, recipe: str, options: list[dict[str, Any]]) -> str:
    cls = PASSES[name]
    doc = pass_doc(cls)
    parts = [f"# {name}", _markdown(doc.summary), _contract(cls, recipe)]
    parts += [_markdown(paragraph) for paragraph in doc.paragraphs]
    parts += ["## In a recipe", f"```yaml\n{recipe}```"]
    parts += [_imported(cls)]
    parts += ["## Options", _options(cls, options)]
    if doc.listings:
        parts.append("## Before and after")
    for heading, listing in doc.listings:
        parts += [f"**{heading}**", f"```text\n{listing}\n```"]
    if doc.refusals:
        parts += ["## What it refuses", *(_markdown(refusal) for refusal in doc.refusals)]
    if doc.source:
        parts += ["## Source", _cited(_markdown(doc.source))]
    return "\n\n".join(parts) + "\n"


def _contract(cls: type[Pass], recipe: str) -> str:
    """Facts, exactness and scope, as a table of one row."""
    step = next(each for each in loads_recipe(recipe).passes if type(each) is cls)
    scope = {"block": "layer by layer", "program": "on the whole program"}[step.scope]
    row = {
        "needs": _facts(cls.requires) or "nothing",
        "gives": _facts(cls.provides) or "no fact",
        "drops": _facts(cls.invalidates),
        "numbers": "may change" if cls.lossy else "stay: proven to be exact",
        "runs": scope,
    }
    shown = {key: value for key, value in row.items() if value}
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (shown, ["---"] * len(shown), shown.values())
    )


def _imported(cls: type[Pass]) -> str:
    return f"In Python: `from zeroskip.passes import {cls.__name__}`."


def _options(cls: type[Pass], options: list[dict[str, Any]]) -> str:
    if not options:
        return "None."
    texts = option_docs(cls)
    lines = ["| option | type | default | what it is |", "|---|---|---|---|"]
    for option in options:
        default = "required" if option["required"] else f"`{json.dumps(option['default'])}`"
        cells = [f"`{option['name']}`", f"`{option['type']}`", default, texts[option["name"]]]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines)


def _facts(kinds: tuple[type, ...]) -> str:
    return ", ".join(f"`{kind.__name__}`" for kind in kinds)


def _one_line(text: str) -> str:
    return _cell(" ".join(text.split()))


def _cell(text: str) -> str:
    """The text with bars that do not end the cell."""
    return text.replace("|", "\\|")


def _markdown(paragraph: str) -> str:
    """A paragraph of a docstring; a formula on a line of its own becomes code."""
    lines = paragraph.splitlines()
    if len(lines) == 1 and re.match(r"^[\w'^]+ = \S", paragraph):
        return f"    {paragraph}"
    return paragraph


def _cited(source: str) -> str:
    return re.sub(
        r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", " ".join(source.split())
    )
