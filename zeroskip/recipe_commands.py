"""The commands `zeroskip recipe list`, `show`, `check` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.command_line import CommandLine, Json
from zeroskip.exits import EXIT_CODES, manner, refusing_inputs

app = CommandLine(
    help="Recipes: presets, what is in them, whether a file is sound, and a schema for editors.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="A preset, or a YAML or JSON file.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file instead.")]
Pattern = Annotated[
    str | None, typer.Option(help="What passes prune to that do not say it: 50%, 2:4 ...")
]


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the presets: recipes by name."""
    from zeroskip.presets import PRESETS, about

    if as_json:
        rows = [{"name": name, "summary": about(name)} for name in PRESETS]
        typer.echo(json.dumps({"presets": rows}, indent=2))
        return
    width = max(map(len, PRESETS))
    typer.echo("\n".join(f"{name.ljust(width)}  {about(name)}" for name in PRESETS))


@app.command("show")
def show_command(
    recipe: Name,
    pattern: Pattern = None,
    full: Annotated[bool, typer.Option("--full", help="Spell out every option.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Print a recipe as a file that `zeroskip compile` takes: a start for one of your own.

    With --json it is JSON, which is taken as well.
    """
    with refusing_inputs():
        import yaml

        from zeroskip.presets import DEFAULT_PATTERN, PRESETS, find_recipe, preset_text
        from zeroskip.recipe import dump_recipe
        from zeroskip.recipe_yaml import RecipeLoader

        plan = find_recipe(recipe, pattern)
        is_preset = recipe in PRESETS and not Path(recipe).exists()
        if is_preset and not full:
            text = preset_text(recipe, pattern or DEFAULT_PATTERN)
        else:
            text = dump_recipe(plan, defaults=full)
    if as_json:
        text = json.dumps(yaml.load(text, Loader=RecipeLoader), indent=2, ensure_ascii=False)
    _deliver(text.rstrip(), out, as_json)


@app.command("check")
def check_command(recipe: Name, pattern: Pattern = None, as_json: Json = False) -> None:
    """Say whether RECIPE is sound by itself; whether it fits a model shows when it is compiled.

    Names, options, types and values are checked, that each pass finds what it needs before it, that
    gates can be decided, and that the texts are there.
    """
    with refusing_inputs():
        from zeroskip.gates import check_decidable
        from zeroskip.ir.errors import RecipeError
        from zeroskip.ir.facts import Roles
        from zeroskip.passes.manager import check_requirements
        from zeroskip.presets import find_recipe
        from zeroskip.text import read_text

        plan = find_recipe(recipe, pattern)
        check_requirements(plan.passes, frozenset({Roles}))
        check_decidable(plan.gates, plan.passes)
        gate = plan.gates.max_perplexity_increase
        for text in (plan.calibration.text, gate.text if gate else None):
            if text is not None:
                read_text(Path(text), RecipeError)
    names = [step.name for step in plan.passes]
    if as_json:
        typer.echo(json.dumps({"recipe": recipe, "passes": names}, indent=2))
    elif not manner().quiet:
        typer.echo(f"{recipe} is sound: {', '.join(names)}")


@app.command("schema")
def schema_command(
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of recipes (draft 2020-12), with which editors complete and check.

    In a YAML file: `# yaml-language-server: $schema=recipe.schema.json`. It is JSON in any case.
    """
    from zeroskip.recipe_schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    _deliver(text, out, as_json)


def _deliver(text: str, out: Path | None, as_json: bool) -> None:
    """Prints a text, or writes it to a file and says which."""
    if out is None:
        typer.echo(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"file": str(out)}, indent=2))
    elif not manner().quiet:
        typer.echo(str(out))
