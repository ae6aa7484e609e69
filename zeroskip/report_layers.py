"""The parts of a report page about layers: density, error, how weights are spread, every linear."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zeroskip.linear_table import layer_of, role_of
from zeroskip.report_markup import Markup, folded, table, tag
from zeroskip.report_plots import heat_map, histogram_panel, line_panel, short

Linears = Sequence[Mapping[str, Any]]
REACH = 4.0
MOST_ROWS = 1500
MOST_PANELS = 24


def density_section(linears: Linears) -> Markup:
    """How many weights each linear keeps, by layer."""
    rows = by_role(linears, "density")
    pruned = [each for each in linears if each["pattern"] != "dense"]
    return tag(
        "section",
        tag("h2", "Density by layer"),
        tag("p", _density_words(linears, pruned)),
        _map(rows, 0.0, 1.0, "Share of weights that are not zero", lambda v: f"{v:.4f}"),
        _key("0 %", "100 % of the weights are there"),
        _behind(rows, lambda v: f"{v:.4f}"),
        id="density",
    )


def error_section(linears: Linears, gram: bool) -> Markup | None:
    """How far the output of each linear moved; without that, how far its weight did."""
    pruned = [each for each in linears if each["pattern"] != "dense"]
    key = "error" if any(each.get("error") is not None for each in pruned) else "change"
    rows = by_role([each for each in pruned if each.get(key) is not None], key)
    if not rows:
        return None
    if key == "error":
        heading = "Error by layer"
        how = "with the Gram matrix of its inputs" if gram else "from means and variances of inputs"
        words = (
            "How far the output of each linear moved when it was pruned, ||Y' - Y|| / ||Y|| on the "
            f"calibration data, computed {how}. Training that came later is not in it."
        )
    else:
        heading = "Change of the weights by layer"
        words = (
            "||W' - W|| / ||W|| of each pruned linear. What entered it was not observed, so what this "
            "does to its output is not known: put observe before the pruner to know."
        )
    top = max(v for series in rows.values() for v in series.values()) * 1.06 or 1.0
    name, layer, worst = max(
        ((name, k, v) for name, series in rows.items() for k, v in series.items()),
        key=lambda found: found[2],
    )
    shown = dict(list(rows.items())[:MOST_PANELS])
    panels = [
        tag(
            "figure",
            tag("span", f"mean {short(statistics.mean(series.values()))}", class_="figure"),
            tag("h3", role),
            line_panel(
                series,
                [each for other, each in shown.items() if other != role],
                top,
                f"{role}: {heading.lower()}, from {short(min(series.values()))} to "
                f"{short(max(series.values()))}",
            ),
            class_="panel",
        )
        for role, series in shown.items()
    ]
    return tag(
        "section",
        tag("h2", heading),
        tag("p", words),
        tag("p", f"The largest is {short(worst)}: {name}, layer {layer}.", class_="note"),
        tag("div", *panels, class_="grid"),
        tag(
            "div",
            tag("span", tag("i", class_="k-ghost"), "the other linears"),
            tag("span", "● the worst layer"),
            class_="key",
        ),
        _behind(rows, lambda v: f"{v:.4g}"),
        id="error",
    )


def weights_section(histograms: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How the weights are spread, before and after."""
    drawn = [each for each in histograms if each.get("after")][:MOST_PANELS]
    if not drawn:
        return None
    panels, rows = [], []
    for each in drawn:
        before, after = each["before"], each["after"]
        near = _near_zero(after)
        gone = 1 - sum(after) / max(sum(before), 1) if before else None
        title = f"{each['role']}: {sum(after):,} weights that are not zero"
        count = f"x {each['linears']}" if each["linears"] > 1 else ""
        panels.append(
            tag(
                "figure",
                tag("span", count, class_="figure"),
                tag("h3", each["role"]),
                histogram_panel(before, after, REACH, title),
                class_="panel",
            )
        )
        rows.append(
            (
                each["role"],
                each["linears"],
                f"{sum(before):,}" if before else "-",
                f"{sum(after):,}",
                "-" if gone is None else f"{gone:.1%}",
                f"{near:.1%}",
            )
        )
    head = (
        "linears",
        "count",
        "sampled before",
        "not zero after",
        "gone",
        "of these below 0.5 rms",
    )
    return tag(
        "section",
        tag("h2", "How the weights are spread"),
        tag(
            "p",
            "Each linear in units of the root mean square of its own dense weight, on a sample of "
            "its weights, all layers together. Zeros are not drawn: what is missing in the middle "
            "was pruned.",
        ),
        tag("div", *panels, class_="grid"),
        tag(
            "div",
            tag("span", tag("i", class_="k-fill"), "weights after"),
            tag("span", tag("i", class_="k-line"), "weights before"),
            class_="key",
        ),
        folded("The numbers", table(head, rows, numeric=range(1, 6))),
        id="weights",
    )


def linears_section(linears: Linears) -> Markup:
    """Every linear in one folded table."""
    rows = [
        (
            tag("span", each["name"], class_="mono"),
            f"{each['shape'][0]} x {each['shape'][1]}",
            each["pattern"],
            f"{each['density']:.4f}",
            _number(each.get("error")),
            _number(each.get("change")),
            each["note"],
        )
        for each in linears[:MOST_ROWS]
    ]
    head = ("linear", "out x in", "pattern", "density", "error", "change", "note")
    left = len(linears) - len(rows)
    more = tag("p", f"{left} more are in report.json.", class_="note") if left > 0 else None
    content = table(head, rows, numeric=(3, 4, 5), caption="Every linear")
    return tag(
        "section",
        tag("h2", "Every linear"),
        tag("details", tag("summary", f"{len(linears)} linears"), content, more, class_="long"),
        id="linears",
    )


def by_role(linears: Iterable[Mapping[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Returns what linears in layers have under a key: role to layer to value, experts averaged."""
    found: dict[str, dict[int, list[float]]] = {}
    for each in linears:
        layer = layer_of(each["name"])
        if layer is None:
            continue
        found.setdefault(role_of(each["name"]), {}).setdefault(layer, []).append(float(each[key]))
    return {
        role: {layer: statistics.mean(values) for layer, values in series.items()}
        for role, series in found.items()
    }


def _map(
    rows: Mapping[str, Mapping[int, float]], low: float, high: float, title: str, shown: Any
) -> Markup | None:
    if not rows:
        return None
    drawn = heat_map(rows, low, high, title, shown)
    return tag("figure", tag("div", drawn, class_="panel wide", tabindex=0))


def _key(low: str, high: str) -> Markup:
    scale = tag("i", class_="k-scale")
    return tag("div", tag("span", low), tag("span", scale, high), class_="key")


def _density_words(linears: Linears, pruned: Linears) -> str:
    if not pruned:
        return "No linear was pruned."
    densities = [each["density"] for each in pruned]
    low, high = min(densities), max(densities)
    dense = len(linears) - len(pruned)
    same = f"{low:.4f}" if f"{low:.4f}" == f"{high:.4f}" else f"between {low:.4f} and {high:.4f}"
    kept = {1: " One linear was left dense.", 0: ""}.get(dense, f" {dense} were left dense.")
    return f"The {len(pruned)} pruned linears have density {same}, counted.{kept}"


def _behind(rows: Mapping[str, Mapping[int, float]], shown: Any) -> Markup | None:
    """The table behind a plot, a line for each layer."""
    if not rows:
        return None
    layers = sorted({layer for series in rows.values() for layer in series})
    lines = [
        (layer, *(shown(series[layer]) if layer in series else "-" for series in rows.values()))
        for layer in layers
    ]
    head = ("layer", *rows)
    return folded("The numbers", table(head, lines, numeric=range(len(head))))


def _near_zero(counts: Sequence[int]) -> float:
    """The share of what is not zero that is below half a root mean square."""
    middle, half = len(counts) // 2, int(len(counts) * 0.5 / (2 * REACH))
    return sum(counts[middle - half : middle + half]) / max(sum(counts), 1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
