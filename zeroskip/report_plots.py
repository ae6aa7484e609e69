"""Small plots as inline SVG: coloured by the style sheet, titled for readers that do not see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from zeroskip.report_markup import Markup, join, tag

Series = Mapping[int, float]


def line_panel(
    series: Series,
    others: Sequence[Series],
    top: float,
    title: str,
    label: Callable[[int], str] = "layer {}".format,
) -> Markup:
    """Draws one series over the layers, the others behind it in grey.

    Args:
        series: Layer to value.
        others: What it is to be compared with.
        top: The value at the upper edge, the same for all panels.
        title: For readers that do not see it, and on hovering.
        label: How a layer is written.
    """
    width, height, left, right, under = 240.0, 112.0, 34.0, 6.0, 16.0
    layers = sorted({layer for each in (series, *others) for layer in each})
    first, last = layers[0], layers[-1]

    def x(layer: float) -> float:
        return left + (width - left - right) * (
            (layer - first) / (last - first) if last > first else 0.5
        )

    def y(value: float) -> float:
        return 6 + (height - under - 6) * (1 - min(value / top, 1.0))

    def path(each: Series, class_: str) -> Markup:
        points = " ".join(f"{_n(x(k))},{_n(y(each[k]))}" for k in sorted(each))
        return tag("polyline", points=points, class_=class_)

    largest = max(series, key=lambda layer: series[layer])
    dots = [largest] if len(series) > 1 else list(series)
    return _svg(
        width,
        height,
        title,
        *(
            join(
                [
                    _line(left, y(tick), width - right, y(tick), "grid-line"),
                    _text(left - 5, y(tick) + 4, short(tick), "end"),
                ]
            )
            for tick in ticks(top, 2)
        ),
        *(path(each, "ghost") for each in others),
        path(series, "line"),
        *(
            tag(
                "circle",
                tag("title", f"{label(layer)}: {short(series[layer])}"),
                cx=_n(x(layer)),
                cy=_n(y(series[layer])),
                r=3.5,
                class_="dot",
            )
            for layer in dots
        ),
        _text(x(first), height - 2, label(first), "start" if last > first else "middle"),
        _text(x(last), height - 2, label(last), "end") if last > first else None,
    )


def heat_map(
    rows: Mapping[str, Series],
    low: float,
    high: float,
    title: str,
    shown: Callable[[float], str],
    column: str = "layer",
    labels: Mapping[int, str] | None = None,
) -> Markup:
    """Draws a cell for each value, the darker the higher.

    Args:
        rows: Name of the row to its values by column.
        low: The value of the palest cell.
        high: Of the darkest.
        title: For readers that do not see it.
        shown: How a value is written.
        column: What a column is.
        labels: What stands below columns; by default their numbers.
    """
    columns = sorted({k for series in rows.values() for k in series})
    longest = max(len(name) for name in rows)
    left = min(6.3 * longest + 12, 190.0)
    # Cells of few columns do not grow without end.
    size = min((1000.0 - left) / max(len(columns), 1), 34.0)
    height = 20.0
    cells: list[Markup] = []
    for i, (name, series) in enumerate(rows.items()):
        label = name if len(name) <= 28 else f"...{name[-25:]}"
        cells.append(_text(left - 8, i * height + 14, label, "end"))
        for j, k in enumerate(columns):
            at: dict[str, object] = {
                "x": _n(left + j * size),
                "y": _n(i * height),
                "width": _n(size - 1.5),
                "height": height - 1.5,
                "rx": 2,
            }
            if k not in series:
                cells.append(tag("rect", class_="nothing", **at))
                continue
            share = (series[k] - low) / (high - low) if high > low else 0.5
            where = labels[k] if labels else f"{column} {k}"
            words = tag("title", f"{name}, {where}: {shown(series[k])}")
            opacity = f"{0.06 + 0.94 * min(max(share, 0.0), 1.0):.2f}"
            cells.append(tag("rect", words, class_="cell", fill_opacity=opacity, **at))
    under = len(rows) * height + 13
    step = 1 if labels else max(1, math.ceil(len(columns) * 22 / (size * len(columns))))
    for j, k in enumerate(columns):
        if j % step == 0:
            text = labels[k] if labels else str(k)
            cells.append(_text(left + (j + 0.5) * size - 0.75, under, text, "middle"))
    width = left + size * len(columns)
    drawn = _svg(width, under + 4, title, *cells)
    # It keeps its size: names stay readable, and a narrow page scrolls.
    return tag("div", drawn, style=f"width:{math.ceil(width)}px;max-width:none")


def histogram_panel(
    before: Sequence[int], after: Sequence[int], reach: float, title: str
) -> Markup:
    """Draws what the weights are as bars, and what they were as an outline."""
    width, height, under = 240.0, 92.0, 16.0
    top = max([*before, *after, 1])
    base = height - under
    step = width / len(after)

    def y(count: int) -> float:
        return base - (base - 4) * count / top

    # One path for all bars: a page has many.
    bars = "".join(
        f"M{_n(i * step)} {_n(base)}V{_n(y(n))}h{_n(step - 0.6)}V{_n(base)}z"
        for i, n in enumerate(after)
        if n
    )
    outline = f"M0 {_n(base)}" + "".join(
        f"V{_n(y(n))}H{_n((i + 1) * step)}" for i, n in enumerate(before)
    )
    return _svg(
        width,
        height,
        title,
        tag("path", d=bars, class_="fill") if bars else None,
        tag("path", d=f"{outline}V{_n(base)}", class_="outline") if before else None,
        _line(0, base, width, base, "axis"),
        _text(0, height - 2, f"-{reach:g}", "start"),
        _text(width / 2, height - 2, "0", "middle"),
        _text(width, height - 2, f"{reach:g} rms", "end"),
    )


def range_bar(low: float, middle: float, high: float, top: float, title: str) -> Markup:
    """Draws from the lowest to the highest speed-up of like linears; the dashed line is 1."""
    width, height = 220.0, 16.0

    def x(value: float) -> float:
        return 4 + (width - 8) * min(value / top, 1.0)

    class_ = "dot" if low >= 1 else "dot second"
    return _svg(
        width,
        height,
        title,
        _line(4, 8, width - 4, 8, "axis"),
        _line(x(1), 0, x(1), height, "one"),
        tag(
            "rect",
            x=_n(x(low)),
            y=5,
            width=_n(max(x(high) - x(low), 1.0)),
            height=6,
            rx=3,
            class_="fill",
        ),
        tag("circle", cx=_n(x(middle)), cy=8, r=5, class_=class_),
    )


def curve_plot(
    points: Sequence[tuple[float, float]],
    title: str,
    x_name: str,
    y_name: str,
    *,
    series: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Markup:
    """Draws y over x with axes, and further series in grey behind it."""
    width, height, left, right, over, under = 680.0, 300.0, 58.0, 20.0, 22.0, 40.0
    known = [*points, *(p for each in (series or {}).values() for p in each)]
    xs, ys = [p[0] for p in known], [p[1] for p in known]
    x_low, x_high = min(xs), max(xs)
    y_high = max(ys) * 1.05 or 1.0
    y_low = 0.0 if min(ys) < 0.5 * max(ys) else min(ys) - 0.1 * (max(ys) - min(ys) or 1.0)

    def x(value: float) -> float:
        return left + (width - left - right) * (
            (value - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        )

    def y(value: float) -> float:
        return over + (height - over - under) * (1 - (value - y_low) / (y_high - y_low))

    def path(each: Sequence[tuple[float, float]], class_: str, name: str | None) -> Markup:
        drawn = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in each)
        return tag("polyline", tag("title", name) if name else None, points=drawn, class_=class_)

    marks = [tick for tick in ticks(y_high, 5) if tick >= y_low]
    return _svg(
        width,
        height,
        title,
        *(
            join(
                [
                    _line(left, y(tick), width - right, y(tick), "grid-line"),
                    _text(left - 8, y(tick) + 4, short(tick), "end"),
                ]
            )
            for tick in marks
        ),
        *(path(each, "ghost", name) for name, each in (series or {}).items()),
        path(points, "line", None),
        *(
            tag(
                "circle",
                tag("title", f"{x_name} {short(a)}: {y_name} {short(b)}"),
                cx=_n(x(a)),
                cy=_n(y(b)),
                r=4.5,
                class_="dot",
            )
            for a, b in points
        ),
        *(_text(x(a), height - under + 17, short(a), "middle") for a, _ in points),
        _text(left - 46, 11, y_name, "start", "strong"),
        _text(width - right, height - 4, x_name, "end", "strong"),
    )


def ticks(top: float, count: int) -> list[float]:
    """Returns round numbers from 0 up to at most `top`, at least `count` of them besides 0."""
    if top <= 0:
        return [0.0]
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (5, 2.5, 2, 1) if m * power <= rough * 1.001)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Returns a number with as many digits as a person wants to see."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text or abs(value) < 1e-4 else f"{value:.0f}"


def _svg(width: float, height: float, title: str, *children: object) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        *children,
        viewBox=f"0 0 {_n(width)} {_n(height)}",
        role="img",
        aria_label=title,
    )


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=class_)


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Markup:
    return tag("text", text, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
