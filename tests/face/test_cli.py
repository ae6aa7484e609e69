from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zeroskip import cli
from zeroskip.ir.errors import CompileError
from zeroskip.ir.program import Program
from zeroskip.passes import PASSES, ApplyMasks
from zeroskip.recipe import load_recipe

RECIPE = """\
passes:
  - prune-magnitude: {pattern: "2:4"}
  - apply-masks
"""
CALIBRATED = """\
passes:
  - observe
  - prune-wanda: {pattern: "2:4"}
  - apply-masks
  - export-onnx: {directory: onnx}
calibration: {samples: 2, sequence_length: 32}
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    out, err = capsys.readouterr()
    return (code if isinstance(code, int) else int(code is not None)), out, err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_help_states_the_exit_codes_and_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "zeroskip", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
    for heavy in ("torch", "transformers", "onnxruntime"):
        assert not re.search(rf"\|\s+{heavy}$", done.stderr, re.M), f"--help imports {heavy}"


def test_compile_writes_the_whole_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    out = tmp_path / "deep" / "build"
    code, stdout, stderr = run(capsys, "compile", checkpoint, "--recipe", recipe, "--out", out)
    assert code == 0, stderr
    assert str(out) in stdout
    assert {path.name for path in out.iterdir()} == {
        "checkpoint", "manifest.json", "recipe.yaml", "report.html", "report.json",
    }  # fmt: skip
    assert load_recipe(out / "recipe.yaml") == load_recipe(recipe)
    report = (out / "report.json").read_text(encoding="utf-8")
    assert json.loads(report)
    assert "partial" not in report
    assert leftovers(out.parent) == []

    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    AutoTokenizer.from_pretrained(out / "checkpoint")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_compile_with_calibration_and_export(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shallow: Path, text_file: Path
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "build"
    recipe.write_text(CALIBRATED, encoding="utf-8")
    arguments = ("--calibration", text_file, "--samples", "3", "--seed", "5", "--json")
    code, stdout, stderr = run(
        capsys, "compile", shallow, "--recipe", recipe, "--out", out, *arguments
    )
    assert code == 0, stderr
    assert json.loads(stdout) == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert "partial" not in stdout
    ran = load_recipe(out / "recipe.yaml")
    assert (ran.calibration.samples, ran.calibration.sequence_length) == (3, 32)
    assert ran.calibration.seed == 5
    assert (out / "onnx" / "model.onnx").is_file()

    perplexities = []
    for target in (out / "checkpoint", out / "onnx"):
        code, stdout, stderr = run(
            capsys, "eval", target, "--text", text_file, "--sequence-length", "64",
            "--max-tokens", "200", "--json",
        )  # fmt: skip
        assert code == 0, stderr
        perplexities.append(json.loads(stdout)["perplexity"])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)


def test_quiet_prints_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    out = tmp_path / "build"
    code, stdout, stderr = run(capsys, "compile", checkpoint, "-r", recipe, "-o", out, "--quiet")
    assert (code, stdout, stderr) == (0, "", "")


def test_json_comes_without_the_bars_of_transformers(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text_file: Path
) -> None:
    arguments = ("eval", checkpoint, "--text", text_file, "--max-tokens", "100")
    code, _, stderr = run(capsys, *arguments)
    assert code == 0
    assert "Loading weights" in stderr
    code, _, stderr = run(capsys, *arguments, "--json")
    assert code == 0
    assert "Loading weights" not in stderr


def test_an_occupied_folder_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    out = tmp_path / "build"
    out.mkdir()
    (out / "mine.txt").write_text("precious", encoding="utf-8")
    code, _, stderr = run(capsys, "compile", checkpoint, "-r", recipe, "-o", out)
    assert code == 2
    assert "already holds something" in stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    out = tmp_path / "build"
    out.mkdir()
    assert run(capsys, "compile", checkpoint, "-r", recipe, "-o", out)[0] == 0
    assert (out / "report.json").is_file()


def test_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, recipe: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    out = tmp_path / "file" / "build"
    code, _, stderr = run(capsys, "compile", checkpoint, "-r", recipe, "-o", out)
    assert code == 2
    assert "cannot be written" in stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [prune-magnitud: {pattern: 2:4}]", "Did you mean `prune-magnitude`?"),
        ("passes: [prune-magnitude: {pattern: nonsense}]", "nonsense"),
        ("passes: [", "line 1"),
    ],
)
def test_a_bad_recipe(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint: Path,
    recipe: Path,
    text: str,
    message: str,
) -> None:
    recipe.write_text(text, encoding="utf-8")
    code, stdout, stderr = run(
        capsys, "compile", checkpoint, "-r", recipe, "-o", tmp_path / "build"
    )
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert str(recipe) in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("missing", ["model", "recipe", "calibration"])
def test_missing_inputs(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint: Path,
    recipe: Path,
    text_file: Path,
    missing: str,
) -> None:
    paths = {"model": checkpoint, "recipe": recipe, "calibration": text_file}
    paths[missing] = tmp_path / "absent"
    code, _, stderr = run(
        capsys, "compile", paths["model"], "-r", paths["recipe"], "-o", tmp_path / "build",
        "--calibration", paths["calibration"], "--samples", "2", "--sequence-length", "8",
    )  # fmt: skip
    assert code == 2
    assert str(tmp_path / "absent") in stderr
    assert leftovers(tmp_path) == []


def test_too_little_calibration_text(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint: Path,
    recipe: Path,
    text_file: Path,
) -> None:
    code, _, stderr = run(
        capsys, "compile", checkpoint, "-r", recipe, "-o", tmp_path / "build", "-c", text_file,
        "--sequence-length", "5000",
    )  # fmt: skip
    assert code == 2
    assert "2000 tokens" in stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [apply-masks]", "apply-masks needs Masks"),
        ("passes: [observe, prune-wanda: {pattern: 2:4}]", "--calibration TEXT"),
        ("passes: [prune-magnitude: {pattern: 2:4, include: ['*nothing*']}]", "*nothing*"),
        ("passes: [prune-magnitude: {pattern: 3:7}]", "3:7 does not fit"),
    ],
)
def test_passes_that_do_not_fit_the_model_are_an_input_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    code, stdout, stderr = run(
        capsys, "compile", checkpoint, "-r", recipe, "-o", tmp_path / "build"
    )
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert not (tmp_path / "build").exists()
    assert leftovers(tmp_path) == []


def test_a_compilation_that_stops_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(self: ApplyMasks, program: Program) -> Program:
        raise CompileError("nothing goes on")

    monkeypatch.setattr(ApplyMasks, "run", stop)
    recipe = tmp_path / "stops.yaml"
    recipe.write_text("passes: [prune-magnitude: {pattern: 2:4}, apply-masks]", encoding="utf-8")
    code, stdout, stderr = run(
        capsys, "compile", checkpoint, "-r", recipe, "-o", tmp_path / "build"
    )
    assert (code, stdout) == (1, "")
    assert "nothing goes on" in stderr
    assert "apply-masks" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "build").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("compile",),
        ("compile", "model", "--samples", "0"),
        ("eval", "model"),
        ("eval", "model", "--text", "t", "--stride", "x"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_eval_prints_and_speaks_json(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, text_file: Path
) -> None:
    options = ("--text", text_file, "--sequence-length", "64", "--max-tokens", "100")
    code, stdout, _ = run(capsys, "eval", checkpoint, *options)
    assert code == 0
    assert "100 tokens" in stdout
    code, stdout, _ = run(capsys, "eval", checkpoint, *options, "--stride", "32", "--json")
    assert code == 0
    result = json.loads(stdout)
    assert (result["tokens"], result["stride"]) == (100, 32)


def test_eval_refuses_what_it_cannot_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, text_file: Path
) -> None:
    code, _, stderr = run(capsys, "eval", tmp_path / "absent", "--text", text_file)
    assert code == 2
    assert "no model here" in stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    code, _, stderr = run(capsys, "eval", checkpoint, "--text", empty)
    assert code == 2
    assert "empty" in stderr


def test_eval_of_a_broken_model_stops(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, text_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "broken")
    code, _, stderr = run(
        capsys, "eval", tmp_path / "broken", "--text", text_file, "--sequence-length", "64"
    )
    assert code == 1
    assert "nan" in stderr


def test_passes_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run(capsys, "passes", "--json")
    assert code == 0
    assert [each["name"] for each in json.loads(stdout)] == list(PASSES)
    code, stdout, _ = run(capsys, "passes")
    assert code == 0
    for name in PASSES:
        assert name in stdout
