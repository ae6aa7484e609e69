"""sensitivity.html: which linears bear pruning, as a heat map and curves."""

from __future__ import annotations

from collections.abc import Mapping

from zeroskip.ir.patterns import Unstructured, parse_pattern
from zeroskip.linear_table import layer_of, role_of
from zeroskip.report_layers import MOST_PANELS, MOST_ROWS
from zeroskip.report_markup import Markup, folded, table, tag
from zeroskip.report_page import page, tiles
from zeroskip.report_plots import heat_map, line_panel, short
from zeroskip.sensitivity import LinearSensitivity, Sensitivity, mean_error, shown

Roles = Mapping[str, list[LinearSensitivity]]


def sensitivity_page(found: Sensitivity) -> str:
    """Returns the page as text; it needs nothing but a browser."""
    roles: dict[str, list[LinearSensitivity]] = {}
    for each in found.linears:
        roles.setdefault(role_of(each.name), []).append(each)
    return page(
        f"{found.model}: sensitivity",
        _header(found),
        _maps(found, roles),
        _curves(found, roles),
        _numbers(found),
        footer="Written by zeroskip sensitivity. The same as plain values: sensitivity.json, sensitivity.csv.",
    )


def _header(found: Sensitivity) -> Markup:
    worst = found.worst()
    reference = shown(found.reference)
    items = [
        ("Linears", str(len(found.linears)), f"{len(found.unseen)} unseen" if found.unseen else ""),
        ("Calibration", f"{found.tokens:,}", "tokens, run once through the dense model"),
        (f"Mean error at {reference}", short(mean_error(found.linears, found.reference)), ""),
    ]
    if worst:
        top = worst[0].errors[found.reference] or 0.0
        items.append((f"Worst at {reference}", short(top), worst[0].name))
    return tag(
        "header",
        tag("p", "zeroskip sensitivity", class_="eyebrow"),
        tag("h1", f"{found.model}: what pruning would cost"),
        tag(
            "p",
            "How far the output of each linear moves, ||Y' - Y|| / ||Y||, when that linear alone is "
            "pruned as Wanda does. Errors of linears do not add up to the loss of a model: use them "
            "to see which to leave dense, and allocate-sparsity to share a budget out.",
            class_="lead",
        ),
        tiles(items),
    )


def _maps(found: Sensitivity, roles: Roles) -> Markup | None:
    by_column = {column: _by_layer(roles, column) for column in found.columns}
    by_column = {column: rows for column, rows in by_column.items() if rows}
    if not by_column:
        return None
    reference = found.reference if found.reference in by_column else next(iter(by_column))
    others = [
        tag("div", tag("h3", shown(column)), _map(rows, shown(column)))
        for column, rows in by_column.items()
        if column != reference
    ]
    return tag(
        "section",
        tag("h2", f"Error by layer at {shown(reference)}"),
        _map(by_column[reference], shown(reference)),
        folded("At the other sparsities, each with a scale of its own", *others)
        if others
        else None,
        id="map",
    )


def _map(rows: Mapping[str, Mapping[int, float]], column: str) -> Markup:
    values = [value for series in rows.values() for value in series.values()]
    top = max(values) or 1.0
    drawn = heat_map(rows, 0.0, top, f"Error by layer at {column}", lambda v: f"{v:.4f}")
    scale = tag("span", tag("i", class_="k-scale"), f"{short(top)}, the largest")
    return tag(
        "figure",
        tag("div", drawn, class_="panel wide", tabindex=0),
        tag("div", tag("span", "0"), scale, class_="key"),
    )


def _by_layer(roles: Roles, column: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for role, linears in roles.items():
        of_layers: dict[int, list[LinearSensitivity]] = {}
        for each in linears:
            layer = layer_of(each.name)
            if layer is not None and each.errors[column] is not None:
                of_layers.setdefault(layer, []).append(each)
        if of_layers:
            found[role] = {k: mean_error(same, column) for k, same in of_layers.items()}
    return found


def _curves(found: Sensitivity, roles: Roles) -> Markup | None:
    shares: dict[int, str] = {}
    for column in found.columns:
        pattern = parse_pattern(column)
        if isinstance(pattern, Unstructured):
            shares[round(10_000 * pattern.sparsity)] = column
    if len(shares) < 2:
        return None

    def curve(linears: list[LinearSensitivity]) -> dict[int, float]:
        return {at: mean_error(linears, column) for at, column in shares.items()}

    drawn = dict(list(roles.items())[:MOST_PANELS])
    top = max(
        each.errors[column] or 0.0
        for linears in drawn.values()
        for each in linears
        for column in shares.values()
    )
    panels = [
        tag(
            "figure",
            tag("span", f"x {len(linears)}" if len(linears) > 1 else "", class_="figure"),
            tag("h3", role),
            line_panel(
                curve(linears),
                [curve([each]) for each in linears] if 1 < len(linears) <= 64 else [],
                (top or 1.0) * 1.06,
                f"{role}: mean error against sparsity",
                label=lambda at: f"{at / 100:g}%",
            ),
            class_="panel",
        )
        for role, linears in drawn.items()
    ]
    return tag(
        "section",
        tag("h2", "Error against sparsity"),
        tag("p", "The mean of all layers, and each layer in grey."),
        tag("div", *panels, class_="grid"),
        id="curves",
    )


def _numbers(found: Sensitivity) -> Markup:
    rows = [
        (
            tag("span", each.name, class_="mono"),
            f"{each.shape[0]} x {each.shape[1]}",
            *(
                "-" if (error := each.errors[column]) is None else f"{error:.4f}"
                for column in found.columns
            ),
        )
        for each in found.linears[:MOST_ROWS]
    ]
    head = ("linear", "out x in", *map(shown, found.columns))
    content = table(head, rows, numeric=range(2, len(head)), caption="Error of every linear")
    return tag(
        "section",
        tag("h2", "Every linear"),
        tag("details", tag("summary", f"{len(found.linears)} linears"), content, class_="long"),
        id="linears",
    )
