"""What a recipe says once for all of its passes, put into each pass that does not say it itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zeroskip.ir.errors import RecipeError
from zeroskip.recipe_options import options_of, pattern_options


@dataclass
class Shorthand:
    """Options for every pass that has them and does not set them.

    Args:
        pattern: For every option that is a sparsity pattern.
        targets: For `include`.
        ignore: For `exclude`.
        seed: For `seed`.
    """

    pattern: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: int | None = None
    _used: set[str] = field(default_factory=set, init=False)

    def fill(self, cls: type[Any], given: Mapping[Any, object]) -> dict[Any, object]:
        """Returns the options of a pass with what it was not given."""
        known = options_of(cls)
        filled = dict(given)

        def put(option: str, value: object, name: str) -> None:
            if option in known and option not in given:
                filled[option] = value
                self._used.add(name)

        if self.pattern is not None:
            for option in pattern_options(cls):
                put(option, self.pattern, "pattern")
        if self.targets:
            put("include", list(self.targets), "targets")
        if self.ignore:
            put("exclude", list(self.ignore), "ignore")
        if self.seed is not None:
            put("seed", self.seed, "seed")
        return filled

    def check_used(self, where: str) -> None:
        """Raises RecipeError for what no pass took: it would seem to have an effect.

        A seed has one in any case: it chooses the calibration windows.
        """
        asked = {"pattern": self.pattern, "targets": self.targets, "ignore": self.ignore}
        for name, value in asked.items():
            if value and name not in self._used:
                raise RecipeError(
                    f"`{name}` is there, and no pass takes it: each sets its own or has none.",
                    where=where,
                    next_step=f"Take it out of the passes, or leave `{name}` out.",
                )
