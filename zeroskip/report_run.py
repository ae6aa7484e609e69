"""The parts of a report page about the run: gates, passes, scale groups, recipe, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zeroskip.linear_table import size
from zeroskip.report_markup import Markup, folded, prose, table, tag
from zeroskip.report_plots import curve_plot, short

PACKAGES = ("zeroskip", "torch", "transformers", "onnx", "onnxruntime", "safetensors")


def gates_section(gates: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What was demanded, what was measured, and whether that is enough."""
    if not gates:
        return None
    rows = []
    for gate in gates:
        passed = bool(gate.get("passed"))
        mark = tag(
            "span", "✓ passed" if passed else "✗ failed", class_="pass" if passed else "fail"
        )
        costliest: list[Markup] = []
        for part in gate.get("costliest") or ():
            costliest += [tag("br"), tag("span", part, class_="mono")]
        unit = str(gate.get("unit") or "")
        limit, measured = (_value(gate.get(key), unit) for key in ("limit", "measured"))
        said = tag("span", str(gate.get("detail") or ""), *costliest)
        rows.append((mark, gate.get("name", ""), limit, measured, said))
    failed = sum(not gate.get("passed") for gate in gates)
    words = "All gates passed." if not failed else f"{failed} of {len(gates)} gates failed."
    head = ("", "gate", "limit", "measured", "how; what costs most")
    return tag(
        "section",
        tag("h2", "Gates"),
        tag("p", words),
        table(head, rows, caption="Gates"),
        id="gates",
    )


def curve_section(curve: Mapping[str, Any] | None) -> Markup | None:
    """Perplexity against density, where an elastic artefact was measured."""
    points = (curve or {}).get("curve") or []
    known = [p for p in points if p.get("perplexity") is not None]
    if not points:
        return None
    rows = [
        (
            f"{1 - p['sparsity']:.3g}",
            f"{p['sparsity']:.3g}",
            f"{p['bytes']:,}",
            "-" if p.get("perplexity") is None else f"{p['perplexity']:.4f}",
            "-" if p.get("latency") is None else f"{p['latency']:.3f} ms",
        )
        for p in points
    ]
    head = ("density", "sparsity", "bytes", "perplexity", "latency of a token")
    plot = None
    if len(known) > 1:
        drawn = curve_plot(
            sorted((1 - p["sparsity"], p["perplexity"]) for p in known),
            "Perplexity against density",
            "density",
            "perplexity",
        )
        plot = tag("figure", drawn, class_="panel wide chart")
    words = (
        "What the sparsities of this elastic artefact are worth, as `zeroskip curve` measured them."
        if known
        else "This artefact is elastic; no perplexity was measured: `zeroskip curve OUT --text FILE`."
    )
    return tag(
        "section",
        tag("h2", "Perplexity against density"),
        tag("p", prose(words)),
        plot,
        table(head, rows, numeric=range(5), caption="The curve"),
        id="curve",
    )


def passes_section(report: Mapping[str, Any]) -> Markup:
    """What each pass did, how long it took and how far it moved the outputs."""
    passes = report["passes"]
    longest = max([p["seconds"] for p in passes], default=0) or 1.0
    rows = [
        (
            tag("span", p["name"], class_="mono"),
            tag("span", tag("span", class_="bar", style=f"width:{max(100 * p['seconds'] / longest, 0.5):.1f}%"), class_="track"),
            f"{p['seconds']:.2f} s",
            p["stages"],
            "yes" if p["modified"] else "no",
            "-" if p["drift"] is None else f"{p['drift']:.3g}",
            tag("span", _options(p["options"]), class_="mono"),
        )
        for p in passes
    ]  # fmt: skip
    head = ("pass", "time", "", "parts", "changed", "drift", "options")
    own = sum(p["seconds"] for p in passes)
    groups = report.get("scale_groups") or []
    folded_groups = sum(group["folded"] for group in groups)
    scales = (
        tag("p", f"Scales were folded into {folded_groups} of {len(groups)} groups of channels.")
        if groups
        else None
    )
    return tag(
        "section",
        tag("h2", "What each pass did"),
        tag(
            "p",
            f"{report['seconds']:.1f} s in all; {own:.1f} s in the passes themselves, the rest in "
            "running calibration data from stage to stage and in checking. Drift is how far the "
            "outputs of a part moved, ||after - before|| / ||before||, the largest of all parts.",
        ),
        table(head, rows, numeric=(2, 3, 5), caption="Passes in the order in which they ran"),
        scales,
        id="passes",
    )


def recipe_section(recipe: str) -> Markup:
    """The recipe, and the versions of what ran it."""
    rows = [(name, found) for name in PACKAGES if (found := _version(name))]
    return tag(
        "section",
        tag("h2", "Recipe and versions"),
        folded("recipe.yaml, every option spelled out", tag("pre", recipe)) if recipe else None,
        table(("package", "version"), rows, caption="Versions"),
        id="recipe",
    )


def _options(options: Mapping[str, Any]) -> str:
    """Options as text; those that are off or empty say nothing."""
    shown = {k: v for k, v in options.items() if v not in (None, False, "", [], ())}
    return ", ".join(f"{name}={value}" for name, value in shown.items())[:300]


def _value(value: object, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes" and isinstance(value, (int, float)):
        return size(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{short(value)} {unit}".strip()
    return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
