"""Presets: recipes by name."""

from __future__ import annotations

import textwrap
from pathlib import Path

from zeroskip.ir.errors import RecipeError
from zeroskip.ir.patterns import parse_pattern
from zeroskip.recipe import Recipe, load_recipe, loads_recipe
from zeroskip.recipe_options import check_known, nearest_of

DEFAULT_PATTERN = "50%"

# {pattern} is what to prune to. Read them with `preset`, or copy one and change it.
PRESETS = {
    "fast": """
        # One pass over the calibration data; no weight changes but to zero.
        pattern: "{pattern}"
        passes:
          - observe
          - prune-wanda
          - apply-masks
        calibration: {samples: 32, sequence_length: 512}
    """,
    "balanced": """
        # The kept weights make up for the pruned ones, linear by linear, then layer by layer.
        pattern: "{pattern}"
        passes:
          - observe: {gram: true}
          - prune-sparsegpt
          - reconstruct-blocks
        calibration: {samples: 32, sequence_length: 512}
    """,
    "best": """
        # As balanced, on more data; then all layers together learn what the dense model says.
        pattern: "{pattern}"
        passes:
          - observe: {gram: true}
          - prune-sparsegpt
          - reconstruct-blocks: {epochs: 2, batch: 1, held_out: 0.05}
          - distill-outputs: {epochs: 1, learning_rate: 0.001, batch: 1, held_out: 0.05}
        calibration: {samples: 40, sequence_length: 512}
    """,
}


def preset(name: str, pattern: str = DEFAULT_PATTERN) -> Recipe:
    """Returns a recipe by name: `fast`, `balanced` or `best`.

    Args:
        name: A key of `PRESETS`.
        pattern: What to prune to, such as `2:4` or `50%`.

    Raises:
        RecipeError: There is no such preset, or the text is not a pattern.
    """
    return loads_recipe(preset_text(name, pattern), where=f"preset {name}")


def preset_text(name: str, pattern: str = DEFAULT_PATTERN) -> str:
    """Returns a preset as YAML; see `preset`."""
    check_known(name, PRESETS, "preset", "presets")
    text = textwrap.dedent(PRESETS[name]).strip() + "\n"
    return text.replace("{pattern}", str(parse_pattern(pattern)))


def about(name: str) -> str:
    """Returns what a preset does, in a sentence."""
    check_known(name, PRESETS, "preset", "presets")
    return textwrap.dedent(PRESETS[name]).strip().partition("\n")[0].removeprefix("# ")


def find_recipe(name: str, pattern: str | None = None) -> Recipe:
    """Returns the recipe of a file, or a preset by its name.

    Args:
        name: A path, or a key of `PRESETS`; a file of that name comes first.
        pattern: What to prune to, for every pass that does not say it itself.

    Raises:
        RecipeError: There is neither, or no pass of the file takes the pattern.
    """
    if name in PRESETS and not Path(name).exists():
        return preset(name, pattern or DEFAULT_PATTERN)
    if not Path(name).exists() and not Path(name).suffix:
        nearest = nearest_of(name, PRESETS)
        hint = f"Did you mean `{nearest}`? " if nearest else ""
        raise RecipeError(
            f"There is no recipe {name}: neither a file nor a preset.",
            where=name,
            next_step=f"{hint}Give the path of a file, or a preset: {', '.join(PRESETS)}.",
        )
    return load_recipe(name, pattern)
