"""The lowest speed-ups of packed linears that were seen, for where nothing can be measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from zeroskip.ir.errors import CompileError

TABLE_FILE = Path(__file__).parent / "kernels" / "cpu_table.json"


@dataclass(frozen=True)
class Table:
    """The lowest speed-ups that were seen, by instruction set, values, layout, density and m.

    Args:
        cells: "avx512/bfloat16/0/0" (instruction set, values, accuracy level, layout) to density
            to m to the lowest speed-up over shapes.
        origin: Where the numbers are from.
    """

    cells: Mapping[str, Mapping[float, Mapping[int, float]]]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def speedups(
        self,
        instruction_set: str,
        value_type: str,
        accuracy_level: int,
        layout: int,
        density: float,
        m_values: Sequence[int],
    ) -> dict[int, float] | None:
        """Returns m to the speed-up to expect, or None where the table knows nothing as bad.

        Between two densities or two m it is the lower of both; sparser than the sparsest it is
        that of the sparsest, more rows than the most it is that of the most. Nothing is said of
        weights denser than the densest.
        """
        by_density = self.cells.get(f"{instruction_set}/{value_type}/{accuracy_level}/{layout}", {})
        above = [known for known in by_density if known >= density]
        if not above:
            return None
        below = [known for known in by_density if known <= density]
        near = {min(above), max(below, default=min(above))}
        found = {}
        for m in m_values:
            seen = [_worst_near(by_density[known], m) for known in near]
            if not all(seen):
                return None
            found[m] = min(seen)
        return found


@cache
def load_table(path: Path = TABLE_FILE) -> Table:
    """Reads the table of the package; `python benchmarks/cpu_table.py` makes it.

    Raises:
        CompileError: It is damaged.
    """
    if not path.is_file():
        return Table({})
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        cells = {
            key: {
                float(density): {int(m): float(speedup) for m, speedup in by_m.items()}
                for density, by_m in by_density.items()
            }
            for key, by_density in stored["lowest_speedup"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CompileError(
            f"the table of speed-ups is damaged: {error}",
            where=str(path),
            next_step="install zeroskip again",
        ) from error
    return Table(cells, {key: stored[key] for key in stored if key != "lowest_speedup"})


def _worst_near(by_m: Mapping[int, float], m: int) -> float:
    """The lower value of both neighbours; 0 where nothing is known of so few rows."""
    below, above = [k for k in by_m if k <= m], [k for k in by_m if k >= m]
    if not below:
        return 0.0
    near = [by_m[max(below)], *([by_m[min(above)]] if above else [])]
    return min(near)
