"""The parts of a report page about what the zeros are worth: speed by target, and size."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zeroskip.linear_table import common_name, size, without_numbers
from zeroskip.report_markup import Markup, join, prose, table, tag
from zeroskip.report_plots import range_bar

Linears = Sequence[Mapping[str, Any]]
BITS_OF_WORD = 64
_DECIMAL = re.compile(r"\d+\.\d+")


def speed_verdict(linears: Linears) -> tuple[str, str, str]:
    """Returns whether the zeros pay: `good`, `bad` or ``; a few words; and a sentence."""
    judged = [each for each in linears if each.get("verdict")]
    forced = [each for each in linears if each["note"].startswith("zeroskip::")]
    if forced and not judged:
        return (
            "",
            "not measured",
            (
                f"{len(forced)} linears run sparse because the recipe says so, fast or not. "
                "`zeroskip bench` measures whether that pays."
            ),
        )
    if not judged:
        return (
            "",
            "not measured",
            (
                "Whether the zeros make it faster was not asked. A checkpoint with zeros in it runs as "
                "fast as a dense one: put lower-sparse-linear (CPU) or lower-semi-structured (CUDA) "
                "before export-onnx, or run `zeroskip tune` on the ONNX folder."
            ),
        )
    sparse = [each for each in judged if each["verdict"]["choice"] == "sparse"]
    if not sparse:
        return (
            "bad",
            "keep dense",
            (
                f"None of the {len(judged)} linears that were judged is faster sparse: all of them run "
                "dense. The reasons are below."
            ),
        )
    speeds = [float(s) for each in sparse for s in each["verdict"]["speedup"].values()]
    span = f", {min(speeds):.2f}x to {max(speeds):.2f}x as fast as dense" if speeds else ""
    sources = {each["verdict"]["source"] for each in sparse}
    how = {
        "measured": "measured on this machine",
        "table": "by the table of what was measured before, not on this machine",
        "always": "asked for without a measurement",
    }
    words = ", ".join(how.get(source, source) for source in sorted(sources))
    return (
        "good" if speeds else "",
        f"{len(sparse)} of {len(judged)}",
        (
            f"{len(sparse)} of {len(judged)} linears run sparse{span} ({words}). The others run dense, "
            "because that is faster or nothing is known. These are speeds of single linears: "
            "`zeroskip bench` measures the whole model."
        ),
    )


def speed_section(linears: Linears) -> Markup:
    """Speed-ups by target and number of tokens, and the reason for each linear that stays dense."""
    judged = [each for each in linears if each.get("verdict")]
    words = (
        "How many times as fast as its dense form each linear is, by the number of tokens it is given "
        "at once; like linears of all layers share a line, from the slowest to the fastest of them."
        if judged
        else speed_verdict(linears)[2]
    )
    parts: list[Markup] = []
    rivals = dict.fromkeys(
        (each["verdict"]["rival"], each["verdict"]["threads"]) for each in judged
    )
    for rival, threads in rivals:
        of_one = [
            each
            for each in judged
            if (each["verdict"]["rival"], each["verdict"]["threads"]) == (rival, threads)
        ]
        parts.append(_target(of_one, rival, threads))
    return tag(
        "section",
        tag("h2", "Speed"),
        tag("p", prose(words)),
        *parts,
        _dense_table(linears),
        id="speed",
    )


def _target(linears: Linears, rival: str, threads: int) -> Markup:
    groups = _alike(each for each in linears if each["verdict"]["speedup"])
    on = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    heading = tag("h3", f"Against dense in {rival}{on}")
    if not groups:
        return join([heading, tag("p", "No speeds are known.", class_="note")])
    speeds = [float(s) for each in linears for s in each["verdict"]["speedup"].values()]
    top = max(*speeds, 1.3) * 1.03
    rows = []
    for group in groups:
        name = common_name([each["name"] for each in group])
        by_m: dict[int, list[float]] = {}
        for each in group:
            for m, speed in each["verdict"]["speedup"].items():
                by_m.setdefault(int(m), []).append(float(speed))
        for i, (m, found) in enumerate(by_m.items()):
            low, middle, high = min(found), statistics.median(found), max(found)
            words = f"{name} at {m} tokens: {low:.2f} to {high:.2f} times as fast as dense"
            rows.append(
                (
                    tag("span", name, class_="mono") if i == 0 else "",
                    len(group) if i == 0 else "",
                    m,
                    tag("span", range_bar(low, middle, high, top, words), class_="track"),
                    f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}x",
                    _chosen(group) if i == 0 else "",
                )
            )
    head = ("linears", "count", "tokens", "speed, dashed: dense", "", "runs")
    caption = f"Speed of linears against dense in {rival}"
    key = tag(
        "div",
        tag("span", tag("b", "●", class_="k-fast"), " all at least as fast as dense"),
        tag("span", tag("b", "●", class_="k-slow"), " some slower than dense"),
        class_="key",
    )
    return join([heading, table(head, rows, numeric=(1, 2, 4), caption=caption), key])


def _chosen(group: Linears) -> Markup:
    if group[0]["verdict"]["choice"] == "sparse":
        return tag("span", "✓ sparse", class_="pass")
    return tag("span", "dense", class_="dash")


def _dense_table(linears: Linears) -> Markup | None:
    """Every linear that runs dense and the reason; what differs in numbers alone shares a line."""
    alike: dict[tuple[object, ...], list[tuple[Mapping[str, Any], str]]] = {}
    for each in linears:
        verdict = each.get("verdict")
        if verdict and verdict["choice"] == "sparse":
            continue
        if not verdict and each["note"].startswith("zeroskip::"):
            continue
        reason = verdict["reason"] if verdict else each["note"]
        if not reason and each["pattern"] != "dense":
            reason = "no pass of the recipe lowers it"
        kind = (without_numbers(each["name"]), tuple(each["shape"]), _DECIMAL.sub("#", reason))
        alike.setdefault(kind, []).append((each, reason))
    if not alike:
        return None
    rows = [
        (
            tag("span", common_name([each["name"] for each, _ in group]), class_="mono"),
            len(group),
            f"{group[0][0]['shape'][0]} x {group[0][0]['shape'][1]}",
            _span([each["density"] for each, _ in group]),
            _common_reason([reason for _, reason in group]),
        )
        for group in list(alike.values())[:400]
    ]
    head = ("linears that run dense", "count", "out x in", "density", "because")
    return table(head, rows, numeric=(1,), caption="Linears that run dense, and why")


def _span(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low}-{high}"


def _common_reason(reasons: Sequence[str]) -> str:
    """One reason for many: numbers with a decimal point become a range."""
    columns = zip(*(_DECIMAL.findall(reason) for reason in reasons), strict=True)
    spans = [_span([float(number) for number in column]) for column in columns]
    return _DECIMAL.sub(lambda _: spans.pop(0), reasons[0])


def _alike(linears: Any) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for each in linears:
        verdict = each["verdict"]
        kind = (without_numbers(each["name"]), tuple(each["shape"]), verdict["choice"])
        groups.setdefault(kind, []).append(each)
    return list(groups.values())


def weight_bytes(linears: Linears) -> tuple[int, int] | None:
    """Returns the bytes of the linears as they are stored densely, and packed where they are pruned.

    Packed is what a bitmask, the kept values in the dtype of the weight and an offset for each row
    take. None where a report says nothing of dtypes.
    """
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    dense = packed = 0
    for each in linears:
        item = sizes.get(each.get("dtype", ""))
        if item is None:
            return None
        rows, columns = each["shape"]
        own = rows * columns * item
        dense += own
        if each["pattern"] != "dense":
            mask = rows * (BITS_OF_WORD // 8) * -(-columns // BITS_OF_WORD)
            own = min(own, mask + 8 * (rows + 1) + round(each["density"] * rows * columns) * item)
        packed += own
    return dense, packed


def size_section(linears: Linears, folder: Path) -> Markup:
    """What is on the disk, and what the zeros would save."""
    files = _sizes(folder)
    found = weight_bytes(linears)
    bars: list[tuple[str, int, str]] = []
    if found is not None:
        bars.append(("linears, dense", found[0], "as the model stored them before"))
        bars.append(("linears, packed", found[1], "a bitmask and the kept values, computed"))
    notes = {
        "checkpoint": "zeros are stored: not smaller than before, but zip finds them",
        "onnx": "weights are float32, but for packed ones",
    }
    bars += [(f"{name}/", count, notes.get(name, "")) for name, count in files.items()]
    largest = max([count for _, count, _ in bars], default=1) or 1
    rows = [
        (
            name,
            tag("span", tag("span", class_="bar", style=f"width:{max(100 * n / largest, 0.5):.1f}%"), class_="track"),
            size(n),
            words,
        )
        for name, n, words in bars
    ]  # fmt: skip
    head = ("what", "", "bytes", "")
    return tag(
        "section",
        tag("h2", "Size"),
        table(head, rows, numeric=(2,), caption="What the weights and the files take"),
        id="size",
    )


def _sizes(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            found[path.name] = sum(
                file.stat().st_size for file in path.rglob("*") if file.is_file()
            )
    return found
