"""report.html: what a compilation did, on one page that needs nothing but a browser.

No script, no font, no picture from elsewhere: the page says so itself, in its content policy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zeroskip.ir.errors import ArtifactError
from zeroskip.linear_table import size
from zeroskip.report_layers import (
    density_section,
    error_section,
    linears_section,
    weights_section,
)
from zeroskip.report_markup import Markup, prose, tag
from zeroskip.report_plots import short
from zeroskip.report_run import curve_section, gates_section, passes_section, recipe_section
from zeroskip.report_speed import size_section, speed_section, speed_verdict, weight_bytes
from zeroskip.report_style import STYLE

PAGE_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report_page(
    folder: str | Path,
    report: Mapping[str, Any],
    *,
    model: str = "",
    gates: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes report.html into an artefact; recipe.yaml and elastic.json are read from there.

    Args:
        folder: The artefact, with everything else in it already: sizes of its folders are shown.
        report: As `Report.to_json` returns it.
        model: What was compiled, for the headline.
        gates: Of each what `zeroskip.gates.GateResult.to_json` returns.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: It cannot be written.
    """
    folder = Path(folder)
    path = folder / PAGE_FILE
    work = folder / f".{PAGE_FILE}.{os.getpid()}"
    recipe = folder / "recipe.yaml"
    try:
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        page = report_page(
            report, folder=folder, model=model, gates=gates, recipe=text, curve=_curve(folder)
        )
        work.write_text(page, encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise ArtifactError(
            f"{PAGE_FILE} cannot be written: {error}",
            where=str(folder),
            next_step="free space or permissions there and try again",
        ) from error
    return path


def report_page(
    report: Mapping[str, Any],
    *,
    folder: Path,
    model: str = "",
    gates: Sequence[Mapping[str, Any]] = (),
    recipe: str = "",
    curve: Mapping[str, Any] | None = None,
) -> str:
    """Returns the page as text; see `write_report_page`.

    Args:
        report: As `Report.to_json` returns it.
        folder: Whose files are measured.
        model: What was compiled.
        gates: What was demanded.
        recipe: The text of the recipe.
        curve: The content of elastic.json.
    """
    linears = report["linears"]
    gram = any(p["options"].get("gram") for p in report["passes"] if p["name"] == "observe")
    sections = [
        section
        for section in (
            gates_section(gates),
            density_section(linears),
            error_section(linears, gram),
            curve_section(curve),
            speed_section(linears),
            size_section(linears, folder),
            weights_section(report.get("histograms") or []),
            passes_section(report),
            linears_section(linears),
            recipe_section(recipe),
        )
        if section is not None
    ]
    return page(
        f"{model or 'A model'}: zeroskip report",
        _header(report, model, gates, curve),
        *sections,
        footer="Written by zeroskip compile. The same as plain values: report.json.",
    )


def page(title: str, *content: object, footer: str) -> str:
    """Returns a whole page around some content: style, policy, a way to jump to each section.

    Args:
        title: Of the tab.
        content: Pieces of markup.
        footer: What stands at the end.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", *content, tag("footer", footer)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def tiles(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Returns numbers that are to be seen first: name, value, what it means."""
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag("span", name, class_="name"),
                tag("span", value, class_="value"),
                tag("span", prose(more), class_="more") if more else None,
            )
            for name, value, more in items
        ),
        class_="tiles",
    )


def _header(
    report: Mapping[str, Any],
    model: str,
    gates: Sequence[Mapping[str, Any]],
    curve: Mapping[str, Any] | None,
) -> Markup:
    linears = report["linears"]
    pruned = [each for each in linears if each["pattern"] != "dense"]
    patterns = list(dict.fromkeys(each["pattern"] for each in pruned))
    what = "nothing pruned"
    if pruned:
        what = f"density {report['density']:.1%}"
    if 0 < len(patterns) <= 3:
        what = f"pruned to {' and '.join(_pattern(each) for each in patterns)}"
    names = [p["name"] for p in report["passes"]]
    class_, speed, sentence = speed_verdict(linears)
    items = [
        ("Density", f"{report['density']:.1%}", f"of the {len(pruned)} pruned linears; {len(linears)} in all"),
        ("Output drift", short(report["drift"]), "on the example inputs, not a measure of quality"),
    ]  # fmt: skip
    found = weight_bytes(linears)
    if found is not None and pruned:
        share = f"{found[1] / max(found[0], 1):.0%}"
        items.append(("Linears, packed", share, f"{size(found[0])} dense, {size(found[1])} packed"))
    items.append(_perplexity(gates))
    items.append(
        ("Speed", speed, "linears run sparse" if " of " in speed else "by linear and target, below")
    )
    if gates:
        failed = sum(not gate.get("passed") for gate in gates)
        items.append(
            ("Gates", "failed" if failed else "passed", f"{len(gates) - failed} of {len(gates)}")
        )
    links = [
        ("gates", "Gates", bool(gates)),
        ("density", "Density", True),
        ("error", "Error", True),
        ("curve", "Perplexity", bool(curve)),
        ("speed", "Speed", True),
        ("size", "Size", True),
        ("weights", "Weights", bool(report.get("histograms"))),
        ("passes", "Passes", True),
        ("linears", "Linears", True),
        ("recipe", "Recipe", True),
    ]
    return tag(
        "header",
        tag("p", "zeroskip report", class_="eyebrow"),
        tag("h1", f"{model or 'A model'}, {what}"),
        tag("p", f"{' → '.join(names)}, in {report['seconds']:.1f} s.", class_="note mono"),
        tiles(items),
        tag("div", tag("p", prose(sentence)), class_=f"verdict {class_}".strip()),
        tag("nav", *(tag("a", name, href=f"#{at}") for at, name, there in links if there)),
    )


def _pattern(text: str) -> str:
    """A pattern for a headline: a share of weights as a percentage."""
    share, _, rest = text.partition(" ")
    try:
        return f"{100 * float(share):.4g} % zeros{f' by {rest}' if rest else ''}"
    except ValueError:
        return text


def _perplexity(gates: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    for gate in gates:
        dense, own = gate.get("dense_perplexity"), gate.get("perplexity")
        if isinstance(own, (int, float)):
            return ("Perplexity", f"{own:.2f}", f"dense: {dense:.2f}" if dense else "")
    return ("Perplexity", "not measured", "a gate or `zeroskip eval` measures it")


def _curve(folder: Path) -> Mapping[str, Any] | None:
    """What elastic.json says, if there is one that can be read."""
    try:
        found = json.loads((folder / "elastic.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
