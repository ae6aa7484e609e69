"""Gates: what they measure, what is refused before anything runs, and what becomes of a failure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.face.test_cli import leftovers, run
from zeroskip.gate_costs import by_error, by_speed
from zeroskip.gate_result import GateResult, describe_failures, lasting
from zeroskip.recipe import load_recipe

PRUNED = """\
pattern: "2:4"
passes: [prune-magnitude, apply-masks]
gates:
  max_perplexity_increase: {limit: 900%, text: text.txt, sequence_length: 64, max_tokens: 100}
  max_bytes: 1MiB
"""
EXPORTED = """\
pattern: "2:4"
passes:
  - observe
  - prune-wanda
  - apply-masks
  - lower-sparse-linear: {choose: always}
  - export-onnx: {directory: onnx, form: plain}
calibration: {samples: 2, sequence_length: 16, text: text.txt}
gates:
  min_speedup: {limit: 1000x, tokens: [1], rounds: 3, threads: 1}
  parity: 1e-12
  max_bytes: 1KiB
"""


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(PRUNED, encoding="utf-8")
    return path


def test_gates_that_hold_are_in_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    out = tmp_path / "build"
    code, stdout, stderr = run(capsys, "compile", checkpoint, "-r", recipe, "-o", out)
    assert code == 0, stderr
    assert "gate max_perplexity_increase: perplexity" in stdout
    increase, size = json.loads((out / "report.json").read_text(encoding="utf-8"))["gates"]
    assert (increase["name"], increase["passed"], increase["limit"]) == (
        "max_perplexity_increase",
        True,
        10.0,
    )
    assert increase["measured"] == increase["perplexity"] / increase["dense_perplexity"]
    # The dense number is that of the dense model, not of what became of it.
    _, dense, _ = run(
        capsys, "eval", checkpoint, "--text", tmp_path / "text.txt", "--sequence-length", "64",
        "--max-tokens", "100", "--json",
    )  # fmt: skip
    assert increase["dense_perplexity"] == pytest.approx(json.loads(dense)["perplexity"], rel=1e-5)
    files = [path for path in (out / "checkpoint").rglob("*") if path.is_file()]
    assert size["measured"] == sum(path.stat().st_size for path in files)
    assert size["conditions"]["folder"] == "checkpoint"
    kept = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["gates"]
    assert kept["max_bytes"]["measured"] == size["measured"]
    # What is saved says the same from where it lies.
    again = load_recipe(out / "recipe.yaml").gates.max_perplexity_increase
    assert again is not None
    assert Path(str(again.text)).resolve() == (tmp_path / "text.txt").resolve()


def test_a_failure_keeps_the_result_aside_and_says_what_cost_most(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shallow: Path, recipe: Path
) -> None:
    recipe.write_text(EXPORTED, encoding="utf-8")
    out = tmp_path / "build"
    (tmp_path / "build.failed").mkdir()
    arguments = ("compile", shallow, "-r", recipe, "-o", out)
    code, stdout, stderr = run(
        capsys, *arguments, "--gate", "max_perplexity_increase={limit: 0.0001x, sequence_length: 64}",
        "--evaluation", tmp_path / "text.txt", "--json",
    )  # fmt: skip
    assert code == 3, stderr
    assert not out.exists()
    assert leftovers(tmp_path) == []
    aside = tmp_path / "build.failed-2"
    assert (aside / "onnx" / "model.onnx").is_file()
    assert str(aside) in stderr
    assert not list((tmp_path / "build.failed").iterdir())
    document = json.loads(stdout)
    assert (document["error"]["kind"], document["exit_code"]) == ("GateError", 3)
    assert document["gates"] == json.loads((aside / "report.json").read_text())["gates"]
    gates = {gate["name"]: gate for gate in document["gates"]}
    assert not any(gate["passed"] for gate in gates.values())
    for name, gate in gates.items():
        assert name in stderr
        assert gate["costliest"], name
        assert gate["measured"] > 0
    assert "4 of 4 gates failed" in stderr
    assert "output error" in gates["max_perplexity_increase"]["costliest"][0]
    assert gates["min_speedup"]["conditions"]["packed_linears"] == 7
    assert gates["max_bytes"]["costliest"][0].startswith(("model.", "lm_head."))
    assert gates["max_bytes"]["conditions"]["folder"] == "onnx"
    # A time is another in each run: the manifest is to be the same.
    kept = json.loads((aside / "manifest.json").read_text(encoding="utf-8"))
    assert "measured" not in kept["gates"]["min_speedup"]
    assert not any(".dense-" in name for name in kept["files"])


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("min_speedup=2", "the recipe exports none"),
        ("parity=1e-5", "the recipe exports none"),
        ("max_perplexity_increase={limit: 5%}", "has no text"),
        ("max_perplexity_increase={limit: 5%, text: absent.txt}", "absent.txt"),
        ("max_perplexity_increase={limit: 5%, text: TEXT, max_tokens: 300}", "128 positions"),
        ("max_perplexity_increase=1.1", "says not what it means"),
        ("max_speedup=2", "Unknown gate"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    checkpoint: Path,
    recipe: Path,
    gate: str,
    message: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr("zeroskip.compile_job.compile_program", never)
    recipe.write_text("passes: [prune-magnitude, apply-masks]", encoding="utf-8")
    gate = gate.replace("TEXT", str(tmp_path / "text.txt"))
    out = tmp_path / "build"
    code, stdout, stderr = run(
        capsys, "compile", checkpoint, "-r", recipe, "-o", out, "--gate", gate
    )
    assert (code, stdout) == (2, ""), stderr
    assert message in stderr
    assert not out.exists()
    assert leftovers(tmp_path) == []


def test_a_gate_that_cannot_be_measured_has_failed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    checkpoint: Path,
    recipe: Path,
) -> None:
    from zeroskip import gate_measures
    from zeroskip.ir.errors import EvaluationError

    def broken(*_: Any) -> None:
        raise EvaluationError("The loss of token 3 is nan.")

    monkeypatch.setattr(gate_measures, "measure_perplexity", broken)
    out = tmp_path / "build"
    code, stdout, stderr = run(capsys, "compile", checkpoint, "-r", recipe, "-o", out, "--json")
    assert code == 3
    assert "cannot be measured: The loss of token 3 is nan." in stderr
    assert json.loads(stdout)["gates"][0]["measured"] is None
    assert (tmp_path / "build.failed" / "checkpoint").is_dir()


def linear(name: str, **fields: Any) -> Any:
    defaults = {"shape": (8, 8), "pattern": "2:4", "note": "", "verdict": None}
    return SimpleNamespace(name=name, **{**defaults, "error": None, "change": None, **fields})


def test_what_costs_most() -> None:
    linears = [linear(f"l{n}", error=n / 10, change=1.0) for n in range(8)]
    linears += [linear("dense", pattern="dense", error=9.0)]
    assert by_error(linears)[0] == "l7: output error 70.0 %"
    assert len(by_error(linears)) == 5
    assert by_error([linear("a", change=0.5)]) == ("a: change of weights 50.0 %",)
    slow = {"choice": "sparse", "speedup": {"1": 0.9, "128": 2.0}, "reason": ""}
    kept = {"choice": "dense", "speedup": {"1": 0.5}, "reason": "0.50x at m=1"}
    found = [
        linear("sparse", verdict=slow),
        linear("small", verdict=kept),
        linear("large", verdict=kept, shape=(80, 80)),
        linear("always", note="zeroskip::sparse_linear"),
    ]
    assert by_speed(found, 2) == (
        "large: runs dense, 0.50x at m=1",
        "small: runs dense, 0.50x at m=1",
        "sparse: 0.90x at m=1",
        "always: packed without having been measured",
    )
    assert by_speed([linear("a", pattern="dense")], 1) == ("no linear is pruned",)


def test_all_failures_are_listed_and_only_they() -> None:
    results = [
        GateResult("a", 1.0, 2.0, "times", False, "twice", costliest=("x", "y")),
        GateResult("b", 1.0, 0.5, "times", True, "half"),
        GateResult("min_speedup", 2.0, 1.5, "times", False, "less"),
    ]
    text = describe_failures(results)
    assert text.startswith("2 of 3 gates failed")
    assert "x; y" in text
    assert "b: half" not in text
    assert lasting(results)["a"]["measured"] == 2.0
    assert "measured" not in lasting(results)["min_speedup"]
