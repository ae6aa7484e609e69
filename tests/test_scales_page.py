"""The table of docs/scales.md is what the analysis finds; --update-goldens writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.zoo import ZOO
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.passes import FindScaleGroups

PAGE = Path(__file__).parents[1] / "docs" / "scales.md"
ROWS = [n for n in re.findall(r"^\| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.M) if n in ZOO]


def short(linears: Iterable[str]) -> str:
    """Names without layers and experts, the module around them once: `self_attn.(q, k)`."""
    around: dict[str, dict[str, None]] = {}
    for name in linears:
        bare = re.sub(r"\[\d+\]|\.weight$", "", name)
        parts = [part for part in bare.split(".") if not part.isdigit()]
        around.setdefault(".".join(parts[-2:-1]), {})[parts[-1]] = None
    return (
        ", ".join(
            f"{module}.{next(iter(names))}" if len(names) == 1 else f"{module}.({', '.join(names)})"
            for module, names in around.items()
        )
        .replace("layers.", "")
        .removeprefix(".")
    )


def row(name: str, found: ScaleGroups) -> str:
    """One line of the table."""
    readers: dict[str, None] = {}
    pairs: dict[str, None] = {}
    shifted: dict[str, None] = {}
    for group in found.groups.values():
        names = [consumer.linear for consumer in group.consumers]
        if names:
            readers[short(names) + (" (> 0)" if group.positive else "")] = None
        else:
            ends = group.name.removesuffix(" (2)").split(" -> ")
            pairs[short(ends)] = None
        if group.shifts:
            shifted[short(names)] = None
    refused = [each.linear for each in found.refusals if each.side == "inputs"]
    left = {short([each]): None for each in refused}
    cells = ["; ".join(each) or "none" for each in (readers, pairs, left, shifted)]
    return f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_is_found(
    name: str, captured: Callable[[str], Program], request: pytest.FixtureRequest
) -> None:
    expected = row(name, FindScaleGroups()(captured(name)).program.fact(ScaleGroups))
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"^\| {name} \|.*$", re.M)
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(pattern.sub(lambda _: expected, text), encoding="utf-8")
        return
    assert pattern.findall(text) == [expected]


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 10
