"""`zeroskip sensitivity`: its table, files and page, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.face.test_cli import run
from tests.face.test_report_page import HOSTILE, Page
from zeroskip.ir.errors import CompileError
from zeroskip.sensitivity import LinearSensitivity, Sensitivity, patterns_of, shown
from zeroskip.sensitivity_page import sensitivity_page


def made(name: str = "model.layers.{}.mlp.{}.weight") -> Sensitivity:
    linears = [
        LinearSensitivity(
            name.format(layer, part),
            (64, 30),
            {"0.5": 0.2 + layer / 100, "0.7": 0.4 + layer / 50, "2:4": None},
        )
        for layer in range(4)
        for part in ("up", "down")
    ]
    unseen = ("model.layers.3.experts[5]",)
    return Sensitivity("tiny", ("0.5", "0.7", "2:4"), tuple(linears), unseen, 1000, 2.5)


def test_layers_share_a_line_and_what_does_not_fit_is_said() -> None:
    text = str(made())
    (up,) = [line for line in text.splitlines() if line.startswith("model.layers.0-3.mlp.up")]
    assert up.split("  ")[-3:] == ["0.200-0.230", "0.400-0.460", "does not fit"]
    assert "Most sensitive at 50%:\n  0.2300  model.layers.3.mlp.up.weight" in text
    assert "Too few tokens reached 1 linears" in text
    assert "on 1,000 tokens" in text


def test_csv_and_json_have_every_number() -> None:
    rows = list(csv.reader(io.StringIO(made().to_csv())))
    assert rows[0] == ["linear", "out", "in", "0.5", "0.7", "2:4"]
    assert rows[8] == ["model.layers.3.mlp.down.weight", "64", "30", "0.23", "0.46", ""]
    found = json.loads(json.dumps(made().to_json()))
    assert found["linears"][7]["errors"] == {"0.5": 0.23, "0.7": 0.46, "2:4": None}
    assert found["unseen"] == ["model.layers.3.experts[5]"]


def test_the_page_has_maps_and_curves() -> None:
    page = Page(sensitivity_page(made()))
    assert not page.tags & {"script", "img", "link"}
    for text in ("Error by layer at 50%", "Error against sparsity", "0.2300", "1 unseen", "1,000"):
        assert text in page.words
    assert page.words.count("mlp.up, layer 2: 0.2200") == 1


def test_hostile_names_stay_text() -> None:
    page = Page(sensitivity_page(made(HOSTILE + "layers.{}.{}")))
    assert not page.tags & {"script", "img"}
    assert "onerror" not in page.attributes


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        ((None, None, "2:4"), ["30%", "40%", "50%", "60%", "70%", "80%", "90%", "2:4"]),
        (("0.5,70%,50", None, ""), ["50%", "70%"]),
        ((None, "30,0.1", "4:8,2:4"), ["70%", "90%", "4:8", "2:4"]),
        (("", None, "2:4"), ["2:4"]),
    ],
)
def test_what_to_measure(given: tuple[str | None, str | None, str], columns: list[str]) -> None:
    assert [shown(str(pattern)) for pattern in patterns_of(*given)] == columns


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("50", "50", ""), "given together"),
        (("150", None, ""), "no share of weights"),
        (("0", None, ""), "no share of weights"),
        (("half", None, ""), "no share of weights"),
        (("nan", None, ""), "no share of weights"),
        ((None, None, "50%"), "no N:M pattern"),
        ((None, None, "4:2"), "not a sparsity pattern"),
        (("", None, ""), "nothing to measure"),
    ],
)
def test_what_cannot_be_measured(given: tuple[str | None, str | None, str], problem: str) -> None:
    with pytest.raises(CompileError, match=problem) as raised:
        patterns_of(*given)
    assert raised.value.next_step


def test_the_command_writes_a_folder(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    out = tmp_path / "found"
    options = ("--samples", "2", "--sequence-length", "32", "--sparsities", "50,80")
    command = ("sensitivity", checkpoint, "-c", text_file, *options, "-o", out)
    code, text, err = run(capsys, *command, "--exclude", "*down_proj*", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found == json.loads((out / "sensitivity.json").read_text(encoding="utf-8"))
    assert {path.name for path in out.iterdir()} == {
        "sensitivity.json",
        "sensitivity.csv",
        "sensitivity.html",
    }
    # Seven linears in each of two layers; the head is left alone, and what was excluded.
    assert len(found["linears"]) == 12
    for each in found["linears"]:
        assert 0 < each["errors"]["0.5"] < each["errors"]["2:4"] < each["errors"]["0.8"] < 1
    assert found["calibration_tokens"] == 64
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_refusals(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for arguments, problem in (
        ((tmp_path / "absent", "-c", text_file), "There is no model here"),
        ((checkpoint, "-c", tmp_path / "absent.txt"), "absent.txt"),
        ((checkpoint, "-c", text_file, "--sparsities", "150"), "no share of weights"),
        ((checkpoint, "-c", text_file, "-o", tmp_path / "taken"), "taken"),
        ((checkpoint, "-c", text_file, "--memory", "much"), "much"),
    ):
        code, out, err = run(capsys, "sensitivity", *arguments)
        assert (code, out) == (2, ""), arguments
        assert problem in err
        assert "next:" in err
