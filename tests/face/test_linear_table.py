"""The table of linears: which of them share a line, and what it says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from zeroskip.linear_table import Row, linear_table, size, slowest_line
from zeroskip.runtime.dispatch import Verdict


def row(name: str, *, rows: int = 576, **changes: Any) -> Row:
    """A linear that runs sparse, but for what is changed."""
    verdict: dict[str, Any] = {
        "rows": rows,
        "columns": 576,
        "density": 0.5,
        "value_type": "bfloat16",
        "accuracy_level": 0,
        "dense_bytes": 1 << 20,
        "packed_bytes": 1 << 18,
        "layout": 0,
        "speedup": {1: 1.9, 128: 1.4},
        "choice": "sparse",
        "reason": "1.63x on average over m=1, 128",
        "source": "measured",
        **changes,
    }
    # As a report holds it: plain values.
    plain = json.loads(json.dumps(Verdict(**verdict).to_json()))
    return Row(name, (rows, 576), verdict["density"], pattern="50%", verdict=plain)


def dense(name: str, **changes: Any) -> Row:
    return row(
        name, choice="dense", reason="0.93x at m=128", speedup={1: 1.9, 128: 0.93}, **changes
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def body(rows: list[Row]) -> list[list[str]]:
    """The cells of the table, without its head and what is below it."""
    lines = linear_table(rows)
    return [cells(line) for line in lines[2:]][: lines.index("") - 2 if "" in lines else None]


def test_layers_that_fared_alike_share_a_line() -> None:
    rows = [
        each
        for i in range(30)
        for each in (
            row(f"model.layers.{i}.self_attn.q_proj.weight"),
            dense(f"model.layers.{i}.self_attn.k_proj.weight", rows=192),
        )
    ]
    assert body(rows) == [
        [
            "model.layers.0-29.self_attn.q_proj.weight",
            "x 30",
            "576 x 576",
            "50%",
            "0.5000",
            "bfloat16",
            "30.0 MiB -> 7.5 MiB",
            "1.90x @1, 1.40x @128",
            "sparse: 1.63x on average over m=1, 128",
        ],
        [
            "model.layers.0-29.self_attn.k_proj.weight",
            "x 30",
            "192 x 576",
            "50%",
            "0.5000",
            "bfloat16",
            "30.0 MiB -> 7.5 MiB",
            "1.90x @1, 0.93x @128",
            "dense kept: 0.93x at m=128",
        ],
    ]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["layers.0.up", "layers.1.up", "layers.5.up"], "layers.0-1,5.up"),
        ([f"layers.{i}.up" for i in range(0, 20, 2)], "layers.*.up"),
        (["h.0.experts[0]", "h.0.experts[1]", "h.1.experts[0]"], "h.0-1.experts[0-1]"),
        (["encoder.3.layers.7.up", "encoder.3.layers.8.up"], "encoder.3.layers.7-8.up"),
        (["node_linear_4", "node_linear_5"], "node_linear_4-5"),
    ],
)
def test_names_that_differ_in_numbers_become_one(names: list[str], shown: str) -> None:
    (line,) = body([row(name) for name in names])
    assert line[:2] == [shown, f"x {len(names)}"]


@pytest.mark.parametrize(
    "other",
    [
        row("layers.1.fc2"),  # a digit within a word is part of the name
        row("layers.1.fc1", rows=192),
        row("layers.1.fc1", value_type="int8"),
        row("layers.1.fc1", layout=1),
        row("layers.1.fc1", source="table"),
        dense("layers.1.fc1"),
        Row("layers.1.fc1", (576, 576), 0.5, "it is excluded", "50%"),
        Row("layers.1.fc1", (576, 576), 1.0, "not selected", "dense"),
    ],
)
def test_what_differs_does_not_share_a_line(other: Row) -> None:
    assert len(body([row("layers.0.fc1"), other])) == 2


def test_sparsities_of_their_own_are_a_range() -> None:
    def pruned(i: int, pattern: str) -> Row:
        return Row(f"layers.{i}.up", (64, 48), 0.5, pattern=pattern)

    one = 0.5208333333333334
    assert [line[2:4] for line in body([pruned(0, f"{one}"), pruned(1, "0.6875")])] == [
        ["64 x 48", "0.5208-0.6875"]
    ]
    assert body([pruned(0, f"{one}"), pruned(1, f"{one}")])[0][3] == "0.5208"
    assert body([pruned(0, f"{one} matrix")])[0][2] == "0.5208 matrix"
    assert body([pruned(0, "50%"), pruned(1, "50%")])[0][3] == "50%"
    assert len(body([pruned(0, "0.5"), pruned(1, "0.5 matrix"), pruned(2, "2:4")])) == 3


def test_a_line_is_as_slow_as_its_slowest() -> None:
    slow = row(
        "layers.1.up",
        speedup={1: 1.82, 128: 1.0},
        density=0.52,
        packed_bytes=1 << 19,
        reason="1.35x on average over m=1, 128",
    )
    ((_, count, _, _, density, _, packed, speed, chosen),) = body([row("layers.0.up"), slow])
    assert (count, density, packed) == ("x 2", "0.5000-0.5200", "2.0 MiB -> 768 KiB")
    assert speed == "1.82-1.90x @1, 1.00-1.40x @128"
    assert chosen == "sparse: 1.35x on average over m=1, 128"
    found = [row("layers.0.up"), slow, dense("layers.2.up")]
    assert slowest_line(found) == "The slowest of the sparse ones: 1.00x at m=128, layers.1.up."
    assert slowest_line([dense("layers.2.up")]) is None


def test_the_rival_and_the_source_are_named() -> None:
    lines = linear_table([row("a"), row("b", source="table"), row("c", rival="PyTorch", threads=2)])
    below = lines[lines.index("") + 1 :]
    rows = "with m rows (batch x tokens)"
    table = "not measured: the lowest that the table of the package knows"
    assert below == [
        f"speed @ m: of dense in ONNX Runtime, {rows}; measured on this machine with 1 thread",
        f"speed @ m: of dense in ONNX Runtime, {rows}; {table}",
        f"speed @ m: of dense in PyTorch, {rows}; measured on this machine with 2 threads",
    ]


def test_without_verdicts_there_is_no_column_for_them() -> None:
    lines = linear_table([Row("head", (8, 4), 1.0, "output head", "dense")], "note")
    assert [cells(line) for line in (lines[0], lines[2])] == [
        ["linear", "out x in", "pattern", "density", "note"],
        ["head", "8 x 4", "dense", "1.0000", "output head"],
    ]


def test_marks_levels_and_layouts() -> None:
    base = row("a", value_type="int8", accuracy_level=4, layout=1)
    (line,) = body([Row(base.name, base.shape, 0.5, verdict=base.verdict, changed=True)])
    assert "int8 (level 4)" in line
    assert line[-1].startswith("sparse, repacked *: ")
    base = dense("b")
    (line,) = body([Row(base.name, base.shape, 0.5, verdict=base.verdict, changed=True)])
    assert line[-1] == "dense *: 0.93x at m=128"


def test_sizes() -> None:
    assert [size(n) for n in (2048, 3 << 20, 5 << 29)] == ["2 KiB", "3.0 MiB", "2.50 GiB"]
