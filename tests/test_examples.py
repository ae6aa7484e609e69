"""Every example runs as a reader would run it, except those that need a real model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zeroskip.models import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = EXAMPLES.parent / "models"
NEED_MODELS = {"demo.py", "fetch_models.py"}


def run(script: Path, cwd: Path, *arguments: str) -> str:
    """Runs a script and returns what it prints; fails with its errors."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    sorted(path for path in EXAMPLES.glob("*.py") if path.name not in NEED_MODELS),
    ids=lambda path: path.name,
)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    words = [str(tmp_path / "out")] if script.name == "quickstart.py" else []
    printed = run(script, tmp_path, *words)
    assert printed.strip()
    assert time.monotonic() - started < 120
    if words:
        assert "50%" in printed
        assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


@pytest.mark.real
def test_the_demo_runs_on_the_first_layers(tmp_path: Path) -> None:
    """All of it but 28 of the 30 layers, whose export takes minutes."""
    source = MODELS / "smollm2-135m-instruct"
    if not source.is_dir():
        pytest.skip("make models")
    model, tokenizer = load_model(source)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ("--samples", "2", "--sequence-length", "64", "--tokens", "256", "--new-tokens", "4")
    words = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "demo"))
    printed = run(EXAMPLES / "demo.py", tmp_path, *words, *sizes)
    assert printed.count("perplexity") >= 2
    assert (tmp_path / "demo" / "onnx" / "model.onnx").is_file()
    assert (tmp_path / "demo" / "checkpoint" / "config.json").is_file()


def test_the_texts_are_small_and_disjoint() -> None:
    texts = [
        (EXAMPLES / "data" / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("calibration", "evaluation")
    ]
    assert all(len(text.encode()) <= 400_000 for text in texts)
    speeches = [set(text.strip().split("\n\n")) for text in texts]
    assert not speeches[0] & speeches[1]
